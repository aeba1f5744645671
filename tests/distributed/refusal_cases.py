"""What ranks may not do, or not differ in: an error on every rank, at once."""

import warnings
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from prefixmem_fast import AddressSpec, DecodingState, PrefixMem, PrefixMemConfig, attach, optim
from prefixmem_fast.distributed import ExchangeError, load_tables, replicate, save_tables, shard, to_torchrec
from prefixmem_fast.distributed.exchange import Exchange
from prefixmem_fast.distributed.ranks import gathered
from prefixmem_fast.huggingface.table_checkpoints import TableCheckpoints
from tests.distributed.examples import RULES, batches, encoder, loss_of
from tests.distributed.processes import case
from tests.helpers import models

LAYOUTS = {"replicate": replicate, "managed": lambda m, **o: replicate(m, managed=True, **o), "shard": shard}
CODES = batches((8, 8), 1)[0]


def step(model, optimizer, rank):
    loss_of(model, CODES[rank], 1.0).backward()
    optimizer.step()


@case(2)
def ranks_that_differ(rank, world):
    for layout in LAYOUTS.values():
        for name, make, options in (
            ("lr", lambda w: optim.SGD([w], lr=0.1 * (rank + 1)), {}),
            ("lr", lambda w: optim.SGD([w], lr=torch.tensor(0.1 * (rank + 1))), {}),
            ("optimizer", lambda w: (optim.SGD, optim.LazyAdam)[rank]([w], lr=0.1), {}),
            ("seed", lambda w: optim.SGD([w], lr=0.1, seed=rank), {}),
            ("mean|copies", lambda w: optim.SGD([w], lr=0.1), {"reduce": ("mean", "sum")[rank]}),
        ):
            model = layout(encoder("fused"), **options)
            optimizer = make(model.memory.weight)
            before = model.memory.weight.detach().clone()
            with pytest.raises(ExchangeError, match=rf"ranks differ in [a-z_, ]*({name}).*rank 0 has .*; rank 1 has"):
                step(model, optimizer, rank)
            assert torch.equal(model.memory.weight, before)
        model = layout(encoder(("fused", "sparse")[rank]))
        optimizer = RULES["sgd"]([model.memory.weight], lr=0.1)
        with pytest.raises(ExchangeError, match="ranks differ in grad"):
            step(model, optimizer, rank)
    with pytest.raises(ExchangeError, match="ranks differ in spec"):
        replicate(encoder("fused", mode=("prefix", "full")[rank]))
    with pytest.raises(ExchangeError, match="ranks differ in dtype"):
        shard(encoder("fused", dtype=(torch.float32, torch.bfloat16)[rank]))


@case(2)
def copies_that_have_gone_apart(rank, world):
    model = replicate(encoder("fused"))
    optimizer = RULES["adagrad"]([model.memory.weight], lr=0.1)
    with torch.no_grad():
        model.memory.weight[0].add_(rank)
    with pytest.raises(ExchangeError, match="ranks differ in a sample of the rows and their state"):
        step(model, optimizer, rank)
    with pytest.raises(ValueError, match="memory has other rows on rank"):
        save_tables(model, "nowhere")


@case(2)
def calls_out_of_step(rank, world):
    """One evaluates where the other trains; one clips alone."""
    model = shard(encoder("sparse"))
    optimizer = RULES["adagrad"]([model.memory.weight], lr=0.1)
    step(model, optimizer, rank)
    loss = loss_of(model, CODES[rank], 1.0)
    call = (loss.backward, lambda: model(CODES[rank]))[rank]
    with pytest.raises(ExchangeError, match=r"ranks differ in call.*rank 0 has call = gradient"):
        call()


@case(2)
def one_rank_refuses_and_all_do(rank, world):
    with pytest.raises(ValueError, match='grad="dense", whose gradient'):
        replicate(encoder(("fused", "dense")[rank]))
    with pytest.raises(FileNotFoundError, match="holds no tables"):
        load_tables(shard(encoder("fused")), f"nowhere-{rank}")


@case(2)
def calls_on_parts(rank, world):
    model = shard(encoder("fused"))
    for call in (lambda: model.quantize("int8"), lambda: to_torchrec(model)):
        with pytest.raises(ValueError, match="needs whole tables, and these are divided over processes"):
            call()
    tokens = shard(models.encoder(grad="fused"))
    with pytest.raises(ValueError, match="DecodingState needs whole tables"):
        DecodingState(tokens, models.vocabulary(), 2)
    held = encoder("fused")
    optimizer = RULES["sgd"]([held.memory.weight], lr=0.1)
    with pytest.raises(ValueError, match="build the optimizer after shard"):
        shard(held)
    del optimizer
    with pytest.warns(UserWarning, match="the state_dict has no memory.weight, as tables that are divided"):
        model.load_state_dict(dict(model.state_dict()))


@case(2)
def managed_tables_are_frozen_and_cleared_with_the_encoder(rank, world):
    for layout in ("managed", "shard"):
        model = LAYOUTS[layout](encoder("sparse"))
        optimizer = optim.for_model(model, 0.1)
        loss_of(model, CODES[rank], 1.0).backward()
        model.zero_grad()
        assert model.memory.weight.grad is None
        loss_of(model, CODES[rank], 1.0).backward()
        optimizer.step()  # the model around it has no zero_grad that reaches the table
        assert model.memory.weight.grad is None
        model.requires_grad_(False)
        assert not model.memory.weight.requires_grad
        model.requires_grad_(True)
        with torch.autocast("cpu", torch.float16), pytest.raises(RuntimeError, match="autocast is in float16"):
            model(CODES[rank])
        del optimizer
        other = LAYOUTS[layout](encoder("sparse"))
        with pytest.warns(UserWarning, match=r"no optimizer of prefixmem_fast\.optim holds it"):
            other(CODES[rank])


@case(2)
def a_callback_says_what_max_grad_norm_does_not_reach(rank, world):
    arguments = SimpleNamespace(max_grad_norm=1.0, output_dir="nowhere")
    for layout, told in (("managed", True), ("shard", True), ("replicate", False)):
        model = LAYOUTS[layout](encoder("fused"))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            TableCheckpoints().on_train_begin(arguments, SimpleNamespace(global_step=0), None, model=model)
        assert any("max_grad_norm = 1.0 does not reach" in str(warning.message) for warning in found) == told


@case(2)
def parts_round_by_bits_of_their_own(rank, world):
    model = shard(encoder("fused", dtype=torch.bfloat16))
    optimizer = optim.SGD([model.memory.weight], lr=0.1, seed=5)
    seed = optimizer.begin(model.memory.weight).seed
    assert (seed == 5) == (rank == 0)
    assert len(set(gathered(seed))) == world


@case(2)
def a_skipped_batch_is_no_lost_gradient(rank, world):
    model = replicate(encoder("sparse"))
    optimizer = RULES["sgd"]([model.memory.weight], lr=0.1)
    loss_of(model, CODES[rank], 1.0).backward()
    optimizer.zero_grad()
    optimizer.step()
    loss_of(model, CODES[rank], 1.0).backward()
    model.memory.weight.grad = None  # as a wrapper does
    with pytest.raises(RuntimeError, match=r"the gradient of the table of shape .* is gone"):
        optimizer.step()


@case(2)
def norms_that_are_not_finite(rank, world):
    model = shard(encoder("sparse"))
    optimizer = optim.for_model(model, 0.1)
    loss_of(model, CODES[rank], float("inf")).backward()
    with pytest.raises(RuntimeError, match=r"the total norm of order 2\.0 is"):
        optim.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    del optimizer


@case(2)
def codes_of_large_codebooks(rank, world):
    """They do not fit int16, and ranks may have them in other dtypes."""
    spec = AddressSpec((40_000,) * 3, heads=2, table_rows=50)
    for layout in LAYOUTS.values():
        model = layout(PrefixMem(PrefixMemConfig(spec, memory_dim=8, hidden_size=3), grad="sparse"))
        optimizer = optim.SGD([model.memory.weight], lr=0.1)
        codes = torch.tensor([[39_999, 5, 7]], dtype=(torch.int32, torch.int64)[rank])
        model(codes).sum().backward()
        optimizer.step()


@case(2)
def ranks_wait_as_long_as_the_default_group(rank, world):
    exchange = Exchange()
    assert exchange.group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=60)


@case(2)
def norms_of_parts(rank, world):
    for grad in ("sparse", "fused"):
        model, whole = shard(encoder(grad)), replicate(encoder(grad))
        norms = []
        for one in (model, whole):
            optimizer = optim.for_model(one, 0.1)
            loss_of(one, CODES[rank], 1.0).backward()
            for parameter in one.out_proj.parameters():
                parameter.grad = None
            norms.append(optim.clip_grad_norm_(one, float("inf")))
            del optimizer
        torch.testing.assert_close(norms[0], torch.as_tensor(float(norms[1])), rtol=1e-6, atol=0)


@case(2)
def peft_freezes_managed_tables(rank, world):
    from peft import LoraConfig, get_peft_model

    model = replicate(attach(models.tiny_model(), models.encoder(grad="fused"), models.vocabulary()), managed=True)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).train()
    tokens = torch.tensor([models.sid(1, 1, 1)])
    with pytest.warns(UserWarning, match="get_peft_model has frozen the encoder"):
        adapted(input_ids=tokens, labels=tokens)
    assert not model.prefixmem.memory.weight.requires_grad

"""Tables in the host's memory beside tables on the GPU."""

import pytest
import torch

from prefixmem_fast import AddressSpec, DecodingState, PrefixMem, PrefixMemConfig, SIDVocabulary, attach, optim
from prefixmem_fast.encoder.host_tables import HOST, copy_across

SPEC = AddressSpec((256,) * 4, table_rows=20_000, active_levels=(3, 4))
CONFIG = PrefixMemConfig(SPEC, memory_dim=64, hidden_size=128, output_init_std=0.1)
VOCABULARY = SIDVocabulary.from_table(
    {5 + l * 256 + code: (l + 1, code) for l in range(4) for code in range(256)}, (256,) * 4
)


def made(**options):
    torch.manual_seed(1)
    return PrefixMem(CONFIG, **options, device="cpu").cuda()


def codes(step=0):
    draw = torch.Generator().manual_seed(step)
    return torch.randint(-1, 256, (50, 40, 4), generator=draw).cuda()


def tokens(step=0):
    return (codes(step) + torch.arange(5, 5 + 4 * 256, 256, device="cuda")).flatten(1)


def test_the_model_moves_and_the_table_does_not():
    before = torch.cuda.memory_allocated()
    encoder = made(tables="host")
    assert encoder.memory.weight.device == HOST
    assert encoder.out_proj.weight.is_cuda
    assert torch.cuda.memory_allocated() - before < encoder.memory.weight.nbytes // 2


def test_what_crosses_is_pinned():
    x = codes()
    held = copy_across(x, HOST)
    assert held.is_pinned()
    assert torch.equal(held, x.cpu())
    assert torch.equal(copy_across(held.clone(), x.device), x)
    encoder = made(tables="host")
    encoder.prefetch(x.cpu())
    (gather,) = encoder.memory._reader._gathers
    assert gather.S.result().is_pinned()


def test_reads_are_those_of_a_table_on_the_gpu():
    """Behind other work of the GPU, and on another stream; S is rounded once on either side, so its bits are equal."""
    on_gpu, on_host = made(), made(tables="host")
    large = torch.randn(4096, 4096, device="cuda")
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(20):
                large = (large @ large).tanh()
            batch = codes() + (large[0, 0] * 0).long()
            assert torch.equal(on_host.memory(batch), on_gpu.memory(batch))
            assert torch.equal(
                on_host.memory.read_tokens(tokens(), VOCABULARY), on_gpu.memory.read_tokens(tokens(), VOCABULARY)
            )
            on_host.prefetch(batch)
            assert torch.equal(on_host.memory(batch), on_gpu.memory(batch))
        torch.cuda.synchronize()


@pytest.mark.parametrize("source", ["codes", "tokens"])
@pytest.mark.parametrize(
    "options", [{"grad": "dense"}, {"grad": "sparse"}, {"grad": "fused"}, {"grad": "fused", "overlap": True}], ids=str
)
def test_training_is_that_of_a_table_on_the_gpu(options, source):
    """But for the order in which a row's gradients are added."""
    results = []
    for place in ({}, {"tables": "host", **options}):
        encoder = made(**{"grad": options["grad"], **place})
        optimizer = optim.for_model(encoder, lr=1e-3)
        for step in range(4):
            if place and source == "codes":
                encoder.prefetch(codes(step).cpu())
            m = encoder(codes(step)) if source == "codes" else encoder.encode_tokens(tokens(step), VOCABULARY)
            m.sin().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([encoder.memory.weight.detach().cpu(), encoder.out_proj.weight.detach().cpu()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_loss_scaling_is_refused():
    encoder = made(tables="host", grad="fused")
    optimizer = optim.for_model(encoder)
    with torch.autocast("cuda", torch.float16), pytest.raises(RuntimeError, match="as GradScaler scaled them"):
        encoder(codes())
    assert optimizer is not None


def test_decoding():
    states = [DecodingState(made(**options), VOCABULARY, 50) for options in ({}, {"tables": "host"})]
    ids = tokens()
    for state in states:
        state.prefill(ids[:, :6])
        state.reorder(torch.arange(49, -1, -1, device="cuda"))
    for t in range(6, 16):
        assert torch.equal(*(state.step(ids[:, t]) for state in states))


def test_generation():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.helpers import models

    inputs = {name: value.cuda() for name, value in models.prompts().items()}
    found = []
    for options in ({}, {"tables": "host"}):
        model = attach(models.tiny_model(), models.encoder(**options), models.vocabulary()).cuda()
        found.append(model.generate(**inputs, num_beams=4, max_new_tokens=7))
    assert torch.equal(*found)

"""The documents: their Python runs, their commands parse, their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from prefixmem_fast import detach
from prefixmem_fast.cli import parser_of

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("temporary_folder")

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def named(file):
    return str(file.relative_to(ROOT))


def blocks_of(file):
    return re.findall(r"```python\n(.*?)```", file.read_text(), flags=re.DOTALL)


def run_block(block, file, scope):
    exec(compile(block, str(file), "exec"), scope)
    return scope


def run_blocks(file):
    scope: dict = {}
    for block in blocks_of(file):
        run_block(block, file, scope)
    return scope


@pytest.mark.parametrize("file", DOCUMENTS, ids=named)
def test_python_blocks_run_in_order(file):
    run_blocks(file)


@pytest.mark.parametrize("block", blocks_of(ROOT / "README.md"), ids=range(len(blocks_of(ROOT / "README.md"))))
def test_each_block_of_the_readme_runs_alone(block):
    assert run_block(block, ROOT / "README.md", {})


def test_shapes_that_the_documents_state():
    readme = run_blocks(ROOT / "README.md")
    assert readme["m"].shape == (8, 20, 5, 1024)
    assert readme["S"].shape == (8, 20, 2, 256)
    assert readme["rows"].shape == (8, 20, 5, 4, 4)
    training = run_blocks(ROOT / "docs/training.md")
    assert training["m"].shape == (2, 64, 64)
    assert training["S"].shape == (2, 64, 256)
    addresses = run_blocks(ROOT / "docs/addresses.md")
    assert addresses["spec"].exact_orders == (1,)
    assert addresses["spec"].rows_per_order == (2048, 2_000_000, 2_000_000, 2_000_000)


def test_a_model_loads_as_it_was_saved():
    scope = run_blocks(ROOT / "docs/huggingface.md")
    assert scope["generated"].items[0][0]
    inputs = scope["inputs"]
    assert torch.equal(scope["again"](**inputs).logits, scope["model"].train()(**inputs).logits)


def test_what_the_embedding_returns_after_attach_is_inputs_embeds():
    """As the README and the Hugging Face page say: m is in it, and must not be added again."""
    scope = run_block(blocks_of(ROOT / "README.md")[0], ROOT / "README.md", {})
    model, encoder, vocabulary = scope["model"].eval(), scope["encoder"].eval(), scope["vocabulary"]
    input_ids = vocabulary.encode(scope["catalogue"].codes[:2])
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids).logits)
    detach(model)
    added = model.get_input_embeddings()(input_ids) + encoder.encode_tokens(input_ids, vocabulary)
    assert torch.equal(added, embeds)
    assert not torch.equal(model.get_input_embeddings()(input_ids), embeds)


def commands_of(file):
    """The `prefixmem ...` lines of a document's indented blocks."""
    text = file.read_text().replace("\\\n", " ")
    for line in re.findall(r"^    (?:[A-Z_]+=\S+ )?(prefixmem .*)$", text, flags=re.MULTILINE):
        yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("file", DOCUMENTS, ids=named)
def test_commands_parse(file):
    for arguments in commands_of(file):
        parser_of().parse_args(arguments)


def test_commands_are_seen():
    assert ["verify", "--compile", "--targets", "sm_90"] in list(commands_of(ROOT / "README.md"))


@pytest.mark.parametrize("file", DOCUMENTS, ids=named)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text()):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), target


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170

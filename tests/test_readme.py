import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run_in_order():
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL):
        exec(compile(block, str(README), "exec"), scope)
    assert scope["m"].shape == (2, 64)
    assert scope["S"].shape == (8, 20, 2, 256)
    assert scope["rows"].shape == (8, 20, 5, 4, 4)
    assert isinstance(scope["weight"].grad, torch.Tensor)
    assert scope["found"].items[0][0]
    assert torch.equal(scope["again"](**scope["inputs"]).logits, scope["model"].train()(**scope["inputs"]).logits), (
        "loaded as it was saved"
    )

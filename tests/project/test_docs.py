"""The code in the README and in the documents runs as it stands, one page after another from its top, and prints what is said there."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
#: a block of code, and what follows it if that is what it prints
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", re.DOTALL)
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(page.read_text())]


def code_of(block: str) -> str:
    """Of a block that may be a session of the interpreter."""
    lines = block.splitlines()
    return "\n".join(line[4:] for line in lines if line[:4] in (">>> ", "... ")) if block.startswith(">>>") else block


@pytest.mark.users_defaults
@pytest.mark.compile
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page):
    text, space, dtype = page.read_text(), {"__name__": page.stem}, torch.get_default_dtype()
    try:
        for block in BLOCK.finditer(text):
            place = f"{page.name}:{text[: block.start()].count(chr(10)) + 2}"
            said = io.StringIO()
            with contextlib.redirect_stdout(said), warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                # PyTorch of itself, where it loads its rules for forward mode
                warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
                exec(compile(code_of(block[1]), place, "exec"), space)
            if block[2] is not None:
                assert said.getvalue() == block[2], place
    finally:
        torch.set_default_dtype(dtype)


def test_pages():
    """Those that show how things are done are among them."""
    assert {"README", "choosing", "dae", "hybrid", "steady", "torchdiffeq"} <= {page.stem for page in PAGES}

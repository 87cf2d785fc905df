"""What a Selection means for one base: the ratio of every tensor."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import translate

from bake.errors import UsageError
from bake.identify.checkpoint import BaseIdentity
from bake.identify.families import title
from bake.keys.blocks import EXTENDED, FULL, LISTS, Block, blocks_of, depths, order_of, original_names, scheme_for
from bake.keys.modules import split_by_component
from bake.plan.recipe import is_text_encoder
from bake.plan.selection import Rule, Selection, Words

_BESIDE = ("VAE", "OTHER")  # what lists of block values have no place for, unless they say so


class Ratios:
    """The ratio of every tensor of one base."""

    def __init__(self, selection: Selection, identity: BaseIdentity, names: Collection[str], owner: str) -> None:
        """names: of all tensors of the base. owner: whose selection it is, for messages.

        Raises UsageError for a list of a length that the family does not know, for blocks and components
        that the base does not have, and for rules that are about none of its tensors.
        """
        self._selection, self._owner = selection, owner
        self._identity = identity
        self._names = names
        self._blocks = blocks_of(identity.components, names)
        self._scheme = scheme_for(selection.scheme, identity.family)
        self._originals = self._original_names()
        self._ratios = {name: self._start(block) for name, block in self._blocks.items()}
        self._apply_components()
        self._apply_values()
        self._apply_gradients()
        for rule in selection.rules:
            self._apply(self._about_rule(rule), rule.ratio, f"the rule {str(rule)!r}")
        for named in selection.names:
            self._apply(self._about_pattern(named.pattern), named.ratio, f"the pattern {named.pattern!r}")

    def ratio(self, tensor: str) -> float:
        """The ratio of a tensor, by its full name."""
        return self._ratios[tensor]

    def _start(self, block: Block) -> float:
        """The ratio of what nothing is about."""
        if self._selection.number is not None:
            return self._selection.number
        return 0.0 if self._selection.values and block.name in _BESIDE else 1.0

    def _original_names(self) -> dict[str, str]:
        """tensor -> its name; of a diffusers UNet that in the original layout, which elements are written in."""
        originals = {name: name for name in self._names}
        for component, owned in split_by_component(self._identity.components, self._names):
            if component.naming == "diffusers unet":
                own = {name[len(component.prefix) :]: name for name in owned}
                for path, original in original_names(own).items():
                    originals[own[path]] = f"model.diffusion_model.{original}"
        return originals

    def _apply(self, tensors: Collection[str], ratio: float, what: str) -> None:
        if not tensors:
            raise UsageError(f"{self._owner}: no tensor of the base is what {what} is about")
        self._ratios.update(dict.fromkeys(tensors, ratio))

    def _apply_components(self) -> None:
        owned = {part.name: names for part, names in split_by_component(self._identity.components, self._names)}
        # the narrower name counts: te1 after te
        for wanted, ratio in sorted(self._selection.components, key=lambda item: item[0] != "te"):
            meant = [name for name in owned if name == wanted or (wanted == "te" and is_text_encoder(name))]
            if not meant:
                raise UsageError(f"{self._owner}: {wanted}= is no component of the base; it has {', '.join(owned)}")
            for name in meant:
                self._ratios.update(dict.fromkeys(owned[name], ratio))

    def _apply_values(self) -> None:
        values = self._selection.values
        if not values:
            return
        known = LISTS.get(self._identity.family, {})
        if len(values) not in known:
            raise UsageError(self._wrong_length(len(values), known))
        if len(values) == EXTENDED:
            own = dict(zip(known[EXTENDED], values, strict=True))
            self._ratios.update((name, own[block.fine]) for name, block in self._blocks.items() if block.fine in own)
            return
        own = dict(zip(known[len(values)], values, strict=True))
        unnamed = self._scheme.unnamed if self._selection.number is None else self._selection.number
        for name, block in self._blocks.items():
            home = self._home(block)
            if home == FULL:
                self._ratios[name] = 1.0
            elif home in own:
                self._ratios[name] = own[home]
            elif block.name not in ("BASE", *_BESIDE):
                self._ratios[name] = unnamed

    def _home(self, block: Block) -> str:
        return self._scheme.homes.get(block.name, block.name)

    def _wrong_length(self, count: int, known: Mapping[int, tuple[str, ...]]) -> str:
        named = f" ({self._selection.preset})" if self._selection.preset else ""
        family = title(self._identity.family)
        if not known:
            return (
                f"{self._owner}: lists of block values are known for Stable Diffusion 1, 2, XL and Flux; the base is "
                f"{family}. Name its blocks in rules, such as '{self._example()}:0.5', or give a gradient."
            )
        lengths = ", ".join(f"{length} ({_ends(names)})" for length, names in known.items())
        return f"{self._owner}: {count} block values{named}; for {family} there are {lengths}"

    def _example(self) -> str:
        order = self._order()
        return f"{order[0]}-{order[-1]}:attn"

    def _order(self) -> list[str]:
        return order_of(block.name for block in self._blocks.values())

    def _apply_gradients(self) -> None:
        gradients = self._selection.gradients
        if not gradients:
            return
        depth = depths(block.name for block in self._blocks.values())
        used = set()
        for name, block in self._blocks.items():
            if not self._has_depth(block):
                continue
            for gradient in gradients:
                if gradient.filter in self._originals[name]:
                    self._ratios[name] = gradient.at(depth.get(block.name, 0.0))
                    used.add(gradient)
                    break
        for gradient in gradients:
            if gradient not in used:
                raise UsageError(
                    f"{self._owner}: no tensor of the base is what the gradient {str(gradient)!r} is about"
                )

    @staticmethod
    def _has_depth(block: Block) -> bool:
        """False for text encoders and VAEs beside the model; what is outside its layers counts as the first."""
        return block.name not in ("BASE", "CLIP", "T5", "TE", *_BESIDE)

    def _about_rule(self, rule: Rule) -> list[str]:
        blocks = self._named_blocks(rule.blocks)
        elements = [word.replace(".", "_") for word in rule.elements.words]

        def is_meant(name: str) -> bool:
            block = self._blocks[name]
            in_block = not rule.blocks.words or bool(blocks & {block.name, self._home(block)}) != rule.blocks.inverted
            if not in_block or not elements:
                return in_block
            original = self._originals[name].replace(".", "_")
            return any(word in original for word in elements) != rule.elements.inverted

        return list(filter(is_meant, self._names))

    def _about_pattern(self, pattern: str) -> list[str]:
        try:
            fits = re.compile(translate(pattern)).match
        except re.error as error:
            raise UsageError(f"{self._owner}: {pattern!r} is no pattern: {error}") from None
        return [name for name in self._names if fits(name) or fits(self._originals[name])]

    def _named_blocks(self, wanted: Words) -> set[str]:
        """The blocks that a rule names, ranges written out."""
        order = self._order()
        named: set[str] = set()
        for word in wanted.words:
            ends = [order.index(self._block(end, order)) for end in word.split("-")]
            if len(ends) > 2:
                raise UsageError(f"{self._owner}: {word!r} is no block, nor a range of two")
            named.update(order[min(ends) : max(ends) + 1])
        return named

    def _block(self, name: str, order: Collection[str]) -> str:
        """`name` as bake writes it; raises UsageError if the base has no such block."""
        name = "M00" if name == "MID" else name
        if name not in order:
            raise UsageError(f"{self._owner}: the base has no block {name!r}; it has {', '.join(order)}")
        return name


def _ends(names: tuple[str, ...]) -> str:
    """A list of blocks in short."""
    return f"{names[0]} to {names[-1]}"

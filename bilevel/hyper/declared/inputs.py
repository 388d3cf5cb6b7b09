"""What is done to a batch's inputs before the loss sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from bilevel.constraints import Coordinate, Interval, Log, Unit
from bilevel.game.modules import CallableVariables
from bilevel.game.player import kind
from bilevel.hyper.criterion import MixedCriterion
from bilevel.hyper.declared.base import Declaration, Loss, check_range, started
from bilevel.hyper.images import affine, brightness, cutout, mixup
from bilevel.hyper.noise import noise
from bilevel.tree import Variables


@dataclass(frozen=True, kw_only=True)
class _Inputs(Declaration):
    """Something that is done to a batch's inputs; `inputs` is their place in a batch, a number or a key."""

    inputs: int | str = 0
    within: Coordinate

    def __post_init__(self) -> None:
        check_range(self.within, type(self).__name__)

    def init(self, model: nn.Module) -> Variables:
        """One number."""
        return started(self.within, self.within.tensor(next(model.parameters(), None)))

    def altered(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """The inputs with this strength."""
        raise NotImplementedError

    def changed(self, loss: Loss, strength: Variables) -> Loss:
        """The loss of other inputs."""
        who = type(self).__name__

        def augmented(weights: CallableVariables, batch: Any) -> Tensor:
            inputs = self.altered(part_of(batch, self.inputs, who), strength)
            return loss(weights, with_parts(batch, {self.inputs: inputs}))

        return augmented


@final
@dataclass(frozen=True, kw_only=True)
class Mixup(_Inputs):
    """`bilevel.hyper.mixup` of a batch: of its inputs, and of labels in the cross entropy that the loss calls.

    Args:
        inputs: Where the inputs are in a batch: a place or a key.
        labels: Where the labels are. Floating-point labels are mixed themselves, and any loss will do.
        within: The range of its strength, and its start.

    Examples:
        >>> Mixup().init(nn.Linear(2, 2)).start
        tensor(0.2000)
    """

    name = "mixup"

    labels: int | str = 1
    within: Coordinate = Unit(start=0.2)  # noqa: RUF009  # frozen

    def changed(self, loss: Loss, strength: Variables) -> Loss:
        """The loss of mixed examples."""

        def augmented(weights: CallableVariables, batch: Any) -> Tensor:
            inputs, labels = (part_of(batch, place, "Mixup") for place in (self.inputs, self.labels))
            mixed = mixup(inputs, strength)
            if labels.is_floating_point():
                both = (1.0 - mixed.share) * labels + mixed.share * labels[mixed.order]
                return loss(weights, with_parts(batch, {self.inputs: mixed.inputs, self.labels: both}))
            with MixedCriterion("Mixup", mixed.order, mixed.share) as mode:
                found = loss(weights, with_parts(batch, {self.inputs: mixed.inputs}))
            mode.require_called()
            return found

        return augmented


@final
@dataclass(frozen=True, kw_only=True)
class Cutout(_Inputs):
    """`bilevel.hyper.cutout` of a batch's images.

    Args:
        inputs: Where the images are in a batch: a place or a key.
        within: The range of its strength, and its start.

    Examples:
        >>> Cutout().name
        'cutout'
    """

    name = "cutout"

    within: Coordinate = Unit(start=0.2)  # noqa: RUF009  # frozen

    def altered(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """Cut."""
        return cutout(inputs, strength)


@final
@dataclass(frozen=True, kw_only=True)
class Noise(_Inputs):
    """`bilevel.hyper.noise` on a batch's inputs.

    Args:
        inputs: Where they are in a batch: a place or a key.
        within: The range of its standard deviation, and its start.

    Examples:
        >>> Noise().name
        'noise'
    """

    name = "noise"

    within: Coordinate = Log(1e-4, 10.0, start=0.1)  # noqa: RUF009  # frozen

    def altered(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """With noise."""
        return noise(inputs, strength)


@final
@dataclass(frozen=True, kw_only=True)
class Shift(_Inputs):
    """Random shifts of a batch's images, `bilevel.hyper.affine(images, shift=...)`, a share of height and width.

    Args:
        inputs: Where the images are in a batch: a place or a key.
        within: The range of its strength, and its start.

    Examples:
        >>> Shift().name
        'shift'
    """

    name = "shift"

    within: Coordinate = Unit(0.0, 0.5, start=0.05)  # noqa: RUF009  # frozen

    def altered(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """Moved."""
        return affine(inputs, shift=strength)


@final
@dataclass(frozen=True, kw_only=True)
class Rotation(_Inputs):
    """Random rotations of a batch's images, `bilevel.hyper.affine(images, rotation=...)`, in degrees.

    Args:
        inputs: Where the images are in a batch: a place or a key.
        within: The range of its strength, and its start.

    Examples:
        >>> Rotation().name
        'rotation'
    """

    name = "rotation"

    within: Coordinate = Interval(0.0, 180.0, start=10.0)  # noqa: RUF009  # frozen

    def altered(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """Turned."""
        return affine(inputs, rotation=strength)


@final
@dataclass(frozen=True, kw_only=True)
class Zoom(_Inputs):
    """Random magnification of a batch's images, `bilevel.hyper.affine(images, zoom=...)`.

    Args:
        inputs: Where the images are in a batch: a place or a key.
        within: The range of its strength, and its start.

    Examples:
        >>> Zoom().name
        'zoom'
    """

    name = "zoom"

    within: Coordinate = Interval(0.0, 1.0, start=0.1)  # noqa: RUF009  # frozen

    def altered(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """Zoomed."""
        return affine(inputs, zoom=strength)


@final
@dataclass(frozen=True, kw_only=True)
class Brightness(_Inputs):
    """Random factors on a batch's images, `bilevel.hyper.brightness`.

    Args:
        inputs: Where the images are in a batch: a place or a key.
        within: The range of its strength, and its start.

    Examples:
        >>> Brightness().name
        'brightness'
    """

    name = "brightness"

    within: Coordinate = Interval(0.0, 1.0, start=0.1)  # noqa: RUF009  # frozen

    def altered(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """Lighter or darker."""
        return brightness(inputs, strength)


def part_of(batch: Any, place: int | str, who: str) -> Tensor:
    """The tensor at a place of a batch."""
    found: Any = None
    if isinstance(batch, Mapping):
        found = batch.get(place)
    elif isinstance(batch, tuple | list) and isinstance(place, int) and -len(batch) <= place < len(batch):
        found = batch[place]
    if not isinstance(found, Tensor):
        what = f"a {type(batch).__name__} of {sorted(map(str, batch))}" if isinstance(batch, Mapping) else kind(batch)
        raise ValueError(
            f"{who} looks for a tensor at {place!r} of the training loss's batch, which is {what}. Say where it is, as "
            f"in {who}(inputs='pixel_values'); a batch is a tuple, a list or a mapping."
        )
    return found


def with_parts(batch: Any, parts: Mapping[int | str, Tensor]) -> Any:
    """A batch with other tensors at some places."""
    if isinstance(batch, Mapping):
        return {**batch, **parts}
    found = list(batch)
    for place, tensor in parts.items():
        found[int(place)] = tensor
    if isinstance(batch, tuple):
        return tuple(found) if type(batch) is tuple else type(batch)(*found)  # a named tuple
    return found

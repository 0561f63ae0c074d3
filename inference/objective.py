"""An objective is a game that trains a guide: players, and a loss for each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .arguments import Checked
from .errors import Incompatible
from .show import knobs_of

if TYPE_CHECKING:
    from .guide import Guide
    from .latents import ModelLike, Values
    from .observation import Observation

__all__ = ["Objective", "Player"]


@dataclass(frozen=True)
class Player:
    """Parameters with a loss of their own.

    Attributes:
        module: whose parameters move.
        steps: updates per step of the fit, each on a fresh batch.
        lr: own learning rate; by default the fit's.
        rate: factor of the fit's learning rate, where there is no own one.
        betas: decays of Adam's averages of gradients and their squares.
        steepest: norm to which larger gradients are cut.
        averaging: decay, per update, of a running average of the parameters that takes their place
            when the fit is over; 0 for none.
    """

    module: nn.Module
    steps: int = 1
    lr: float | None = None
    rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    steepest: float = math.inf
    averaging: float = 0.0


class Objective(Checked, nn.Module):
    """Base of all objectives. Knobs belong to the constructor.

    Args:
        **knobs: what the subclass was built with; kept in checkpoints.

    Attributes:
        needs: the protocol a guide must have.
        remedy: what to use where it has not.
        joint_only: trains on draws from the model's joint, so batches must carry latents.
        learns_model: gives a valid gradient for the model's parameters too.
        learns_guide: gives one for the guide's; else there must be a model to learn.
        subsamples: can be trained on some of the rows of one data set, of which `share` tells.
        progress: share of the fit that is done, in [0, 1), for schedules; set by the loop.
        share: of the rows of one data set that a batch has; set by the loop.
        learn_model: the model's parameters move, too; set by the loop.
    """

    needs: ClassVar[type]
    remedy: ClassVar[str] = "Choose another objective."
    joint_only: ClassVar[bool] = False
    learns_model: ClassVar[bool] = False
    learns_guide: ClassVar[bool] = True
    subsamples: ClassVar[bool] = False
    progress: float = 0.0
    share: float = 1.0
    learn_model: bool = False

    def __init__(self, **knobs: Any) -> None:
        super().__init__()
        self.knobs = knobs

    def extra_repr(self) -> str:
        """The knobs, inside the brackets."""
        return ", ".join(knobs_of(self.knobs))

    def players(self, guide: Guide) -> dict[str, Player]:
        """Who plays, by name; "guide" is always one of them."""
        return {"guide": Player(guide)}

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """A loss per player, scalars in nats per problem unless the objective says otherwise.

        Args:
            model: the model.
            guide: the guide.
            x: observation of B problems.
            z: the latents that made x, where the batch was drawn from the joint.
        """
        raise NotImplementedError

    def loss(
        self, player: str, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> Tensor:
        """The loss of one player: games need not compute the others'."""
        return self(model, guide, x, z)[player]  # type: ignore[no-any-return]

    def health(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, float]:
        """Gauges that say whether the fit goes well, looked at now and then; by default none."""
        return {}

    def check(self, guide: Guide, *, joint: bool, learn_model: bool) -> None:
        """Refuse, before the first step, what cannot work.

        Raises:
            Incompatible: the guide lacks the protocol, the batches lack latents, or the model's
                parameters cannot be learned, or must be and are not.
        """
        mine, theirs = type(self).__name__, type(guide).__name__
        if not isinstance(guide, self.needs):
            raise Incompatible(
                f"{mine} with {theirs}",
                expected=f"a guide with {self.needs.__name__}",
                got="one without",
                fix=self.remedy,
            )
        if self.joint_only and not joint:
            raise Incompatible(
                mine,
                expected="batches from the model's joint",
                got="observations without latents",
                fix="Call fit with x=None, or use ELBO() to train on data.",
            )
        if learn_model and (joint or not self.learns_model):
            raise Incompatible(
                f"{mine} with learn_model=True",
                expected="data and an objective with a valid gradient for the model",
                got="draws from the model itself" if joint else "an objective without one",
                fix="Pass x=data and objective=ELBO().",
            )
        if not (learn_model or self.learns_guide):
            raise Incompatible(
                mine,
                expected="a model to learn",
                got="learn_model=False",
                fix="Pass learn_model=True and x=data; there is nothing for the guide to learn.",
            )

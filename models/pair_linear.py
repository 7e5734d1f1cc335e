"""A linear layer on pairs of a group's row and a member's row, without writing the pairs down."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PairLinear(nn.Linear):
    """What papers write as a 1x1 convolution on [group ‖ member], where all members of a group share the first half."""

    def __init__(self, group_features: int, member_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__(group_features + member_features, out_features, bias=bias)
        self.group_features = group_features

    def forward(  # type: ignore[override]  # two inputs are what it is for
        self, groups: Float[Tensor, "b g c"], members: Float[Tensor, "b g k e"]
    ) -> Float[Tensor, "b g k d"]:
        """One row a member. The group's half of the product is made once a group."""
        on_group = self.weight[:, : self.group_features]
        on_member = self.weight[:, self.group_features :]
        return F.linear(groups, on_group, self.bias)[:, :, None] + F.linear(members, on_member)

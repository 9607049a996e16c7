"""How much of a corpus one forward takes, where nothing is trained."""

from __future__ import annotations

import torch

TOKEN_BUDGET = {"cpu": 2048, "cuda": 65536}  # padded tokens; a CPU is fastest where those of a forward fit its cache


def token_budget_of(device: torch.device | str) -> int:
    """Padded tokens of a forward without gradients on a device."""
    return TOKEN_BUDGET.get(torch.device(device).type, TOKEN_BUDGET["cuda"])

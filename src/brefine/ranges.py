"""Ranges of numbers in recipes, as annotations that pydantic checks."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Stages = Annotated[int, Field(ge=0)]

#: of a dataclass of options: a typo must not pass, nor a number that is none
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

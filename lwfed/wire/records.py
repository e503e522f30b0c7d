"""What messages and records that are kept are made of: frozen, with bounds for every value and no key that is not known."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

MAX_PROTOCOL = 1_000_000  # larger numbers are no versions but junk, and would be quoted to people
MAX_LOSS = 1e6  # beyond it a training has diverged

MAX_NAME = 64  # characters
Name = Annotated[str, Field(pattern=rf"^[a-z0-9-]{{1,{MAX_NAME}}}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Part = Annotated[str, Field(pattern=r"^(stem|(layer|adapter)\.[1-9][0-9]?|norm|projector|predictor|decoder)$")]
Ranges = Annotated[str, Field(pattern=r"^([0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*)?$", max_length=8192)]  # "0-3,7"
MAX_COUNT = 2**53 - 1
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
MAX_ORDINAL = 1_000_000
Ordinal = Annotated[int, Field(ge=1, le=MAX_ORDINAL)]
Amount = Annotated[float, Field(ge=0, le=1e12)]
Loss = Annotated[float, Field(ge=-MAX_LOSS, le=MAX_LOSS)]
Text = Annotated[str, Field(max_length=1000)]
Version = Annotated[int, Field(strict=True, ge=1, le=MAX_PROTOCOL)]
Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Grown(Record):
    """Has fields that came later, left out where they say nothing new: older programs refuse keys that they do not know."""

    LATER: ClassVar[tuple[str, ...]]

    @model_serializer(mode="wrap")
    def _readable_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        silent = [name for name in self.LATER if getattr(self, name) == type(self).model_fields[name].default]
        fields: dict[str, Any] = write(self)
        return {name: value for name, value in fields.items() if name not in silent}

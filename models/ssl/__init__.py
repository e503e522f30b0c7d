"""What is learnt from unlabelled images. A method is a file with a subclass of `Method`, and a line here."""

from __future__ import annotations

from lwfed.models.ssl.byol import Byol
from lwfed.models.ssl.mae import Mae
from lwfed.models.ssl.method import Method
from lwfed.models.ssl.moco_v3 import MoCoV3
from lwfed.models.ssl.simclr import SimClr
from lwfed.plan import SslMethod

METHODS: dict[SslMethod, Method] = {"moco_v3": MoCoV3(), "simclr": SimClr(), "byol": Byol(), "mae": Mae()}

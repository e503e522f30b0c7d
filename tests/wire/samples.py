"""One message of every kind, as version 1 of the protocol writes it. `tests/golden` holds their bytes."""

from __future__ import annotations

from lwfed.wire import messages as m
from lwfed.wire.enrolment import Admission, Enrol
from lwfed.wire.report import Accelerator, Execution, Memory, Reading, Report, Traffic

ID = "ab" * 32
BLOB = m.BlobRef(id=ID, size=3000)
MANIFEST = m.Manifest(blob=BLOB, chunk_bytes=1024, digests=("01" * 32, "02" * 32, "03" * 32))
MEMORY = Memory(
    baseline_mb=217.5,
    peak_mb=301.25,
    peak_source="VmHWM",
    curve=(Reading(t_s=0.5, rss_mb=300.0, uss_mb=250.0, swap_mb=0.0, available_mb=512.0),),
    accelerator=Accelerator(peak_mb=800.5, free_mb=3000.0),
)
REPORT = Report(
    images=500,
    skipped=1,
    steps=42,
    losses=(2.5, 2.25),
    seconds=12.5,
    memory=MEMORY,
    execution=Execution(prefix="onnx", micro_batch=16, precision="fp32", threads=4, torch="2.9.1", machine="aarch64", onnxruntime="1.20.1"),
)
CONTRIBUTION = "c0" * 16
START = m.Start(boot=9, nonce="0123456789abcdef")

SAMPLES: dict[str, m.Message] = {
    "server-state": m.ServerState(online=True, epoch=3),
    "run": m.Run(
        run="cifar10",
        epoch=3,
        seq=17,
        phase="training",
        stage=2,
        stages=12,
        round=5,
        rounds=10,
        config=m.BlobRef(id="cd" * 32, size=812),
        parts={"stem": BLOB, "layer.1": BLOB, "layer.2": BLOB, "norm": BLOB, "projector": BLOB, "predictor": BLOB},
        lr_scale=0.25,
        patches={"layer.2": (m.Patch(base="ef" * 32, blob=m.BlobRef(id="12" * 32, size=700)), m.Patch(base="34" * 32, blob=BLOB))},
        graphs={"onnx": m.BlobRef(id="56" * 32, size=1976), "onnx_int8": m.BlobRef(id="78" * 32, size=2230)},
    ),
    "state": m.State(state="training", start=START),
    "hello": m.Hello(
        start=START, lwfed="0.1.0", python="3.11.7", torch=None, machine="aarch64", cores=4, memory_mb=1848.5, images=500, source="folder"
    ),
    "beat": m.Beat(run="cifar10", stage=2, round=5, epoch=1, epochs=3, step=7, steps=42, loss=-0.125, rss_mb=301.25),
    "got": m.Got(chunks=4),
    "need": m.Need(blobs=(m.Want(id=ID, missing=None), m.Want(id="cd" * 32, missing="0-2,7"))),
    "offer": m.Offer(contribution=CONTRIBUTION, run="cifar10", stage=2, round=5, participant=3, manifest=MANIFEST, report=REPORT),
    "fin": m.Fin(contribution=CONTRIBUTION, traffic=Traffic(down=1_000_000, up=250_000)),
    "fail": m.Fail(run="cifar10", stage=2, round=5, code="memory", reason="needs 900 MB, 400 MB are free", attempt=2),
    "task": m.Task(run="cifar10", stage=2, round=5, participant=3),
    "manifest": MANIFEST,
    "grant": m.Grant(contribution=CONTRIBUTION, worker="w0", missing="0-2", window=4),
    "wait": m.Wait(contribution=CONTRIBUTION, retry_s=30.0),
    "miss": m.Miss(contribution=CONTRIBUTION, missing="1"),
    "done": m.Done(contribution=CONTRIBUTION),
    "enrol": Enrol(secret="s3cr3t-" * 6 + "_", request="-----BEGIN CERTIFICATE REQUEST-----\n"),
    "admission": Admission(device="porch", certificate="-----BEGIN CERTIFICATE-----\n"),
    "challenge": m.Challenge(rival=START.nonce),
    "refuse": m.Refuse(contribution=None, code="stale", reason="round 4 is over"),
}

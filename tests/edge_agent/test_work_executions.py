"""How a stage is computed, as the agent prescribes it round by round: as it began, or with the least memory after that ran out."""

import pytest

from lwfed.config import load_config
from lwfed.edge_agent.events import EndWorker, Train, WorkerError, WorkerOver, WorkerPlanned, WorkerRecomputes
from lwfed.wire.messages import Fail, Offer

RICH = {"prefix": "onnx_int8", "micro_batch": 16, "needs_mb": 300.0}
LEAST = {"prefix": "torch", "micro_batch": 4, "features_in": "file"}


def test_after_memory_ran_out_the_stage_takes_the_least_and_where_that_is_too_much_none(world):
    server, device = world.training(stage=2)
    device.queue.append(WorkerPlanned(**RICH, reason="a trial"))
    device.queue.append(WorkerError("out of memory", "ended by SIGKILL"))
    world.settle()
    text = (
        "stage 2 goes on with the least memory, since memory ran out: frozen layers by torch instead of onnx_int8, "
        "4 images at a time instead of 16; its updates cannot be repeated bit for bit"
    )
    assert text in device.texts("warning")
    server.assign(device.id, stage=2)
    world.settle(2)
    device.ready(torch="2.10")
    world.settle(0.2)
    assert device.worker[-1].order["execution"] == LEAST, "whatever computes it"
    device.queue.append(WorkerError("OutOfMemory", "no memory"))
    world.settle()
    assert [fail.code for fail in server.of(Fail)] == ["memory", "unfit"]
    assert "not asked again until it is restarted" in device.texts("warning")[-1]
    server.announce(stage=3)
    server.assign(device.id, stage=3)
    world.settle(2)
    device.ready()
    world.settle(0.2)
    assert device.worker[-1].order["execution"] is None, "another stage is another matter"


def test_features_leave_memory_where_all_else_takes_the_least_already(world):
    reused = load_config("demo", ["transfer.chunk_bytes=1024", "train.views_per_round=2", "train.features_in=memory"])
    server, device = world.training(stage=2, config=reused)
    planned = WorkerPlanned(prefix="torch", micro_batch=4, reason="little memory", needs_mb=300.0, features_in_memory=True)
    device.queue.append(planned)
    device.queue.append(WorkerError("out of memory", "ended by SIGKILL"))
    world.settle()
    text = "stage 2 goes on with the least memory, since memory ran out: features of views that are used again in a file"
    assert text in device.texts("warning")
    server.assign(device.id, stage=2)
    world.settle(2)
    device.ready()
    world.settle(0.2)
    assert device.worker[-1].order["execution"] == LEAST
    device.queue.append(WorkerError("out of memory", "ended by SIGKILL"))
    world.settle()
    assert [fail.code for fail in server.of(Fail)] == ["memory", "unfit"]


def test_features_that_had_no_room_in_memory_leave_none(world):
    reused = load_config("demo", ["transfer.chunk_bytes=1024", "train.views_per_round=2", "train.features_in=memory"])
    server, device = world.training(stage=2, config=reused)
    device.queue.append(WorkerPlanned(prefix="torch", micro_batch=4, reason="features in a file", needs_mb=300.0))
    device.queue.append(WorkerError("out of memory", "ended by SIGKILL"))
    world.settle()
    assert [fail.code for fail in server.of(Fail)] == ["unfit"], "nothing smaller is left"


def test_a_batch_that_is_small_itself_is_cut_all_the_same(world):
    _, device = world.training(stage=2, config=load_config("demo", ["transfer.chunk_bytes=1024", "train.batch_size=4"]))
    device.queue.append(WorkerPlanned(prefix="torch", micro_batch=4, reason="as many as there are", needs_mb=300.0))
    device.queue.append(WorkerError("out of memory", "ended by SIGKILL"))
    world.settle()
    text = "stage 2 goes on with the least memory, since memory ran out: 3 images at a time instead of 4; "
    assert text + "its updates cannot be repeated bit for bit" in device.texts("warning")


def test_the_least_that_a_stage_takes_is_by_the_engine_of_its_plan_where_that_takes_less_than_torch(world):
    server, device = world.training(stage=2)
    device.queue.append(WorkerPlanned(**RICH, reason="a large batch", least="onnx_int8"))
    device.queue.append(WorkerError("out of memory", "ended by SIGKILL"))
    world.settle()
    text = (
        "stage 2 goes on with the least memory, since memory ran out: 4 images at a time instead of 16; "
        "its updates cannot be repeated bit for bit"
    )
    assert text in device.texts("warning")
    server.assign(device.id, stage=2)
    world.settle(2)
    device.ready()
    world.settle(0.2)
    assert device.worker[-1].order["execution"] == {**LEAST, "prefix": "onnx_int8"}


def test_what_the_least_is_outlasts_a_restart_of_the_agent(world):
    server, device = world.training(stage=2)
    device.queue.append(WorkerPlanned(**RICH, reason="a large batch", least="onnx_int8", features_in_memory=True))
    world.settle(0.2)
    device.kill()
    again = world.start_device()
    again.planned = lambda order: None  # memory runs out before there is a plan
    world.settle()
    server.assign(again.id, stage=2)
    world.settle(2)
    again.ready()
    world.settle(0.2)
    again.queue.append(WorkerError("out of memory", "ended by SIGKILL"))
    world.settle()
    text = (
        "stage 2 goes on with the least memory, since memory ran out: 4 images at a time instead of 16, "
        "features of views that are used again in a file; its updates cannot be repeated bit for bit"
    )
    assert text in again.texts("warning")
    assert again.journal.execution("demo", 2).prefix == "onnx_int8"


def test_a_round_that_takes_more_than_the_budget_is_finished_as_it_began_and_the_next_takes_less(world):
    server, device = world.training()
    device.queue.append(WorkerOver(344.0, 300.0))
    world.settle(0.2)
    assert "stage 1, round 1 takes 344 MB for training, and 300 MB of --memory-budget are left for it" in device.texts("warning")
    device.finish()
    world.settle(2)
    assert server.of(Offer)[0].report.execution.micro_batch == 16
    assert "with the least memory, to keep to --memory-budget: 4 images at a time instead of 16" in device.texts("warning")[-1]
    assert device.worker[-1] == EndWorker(), "only its end gives back what the rich plan held"
    server.announce(round=2)
    server.assign(device.id, round=2)
    world.settle(2)
    device.ready()
    world.settle(0.2)
    assert device.worker[-1].order["execution"] == LEAST
    device.queue.append(WorkerOver(310.0, 300.0))
    device.finish()
    world.settle(2)
    assert server.of(Offer)[1].report.execution.micro_batch == 4
    assert "310 MB for training" in device.texts("warning")[-1], "nothing smaller is left, and the round counts"


def test_how_a_stage_is_computed_is_told_once_and_prescribed_from_then_on(world):
    server, device = world.training()
    assert [order.order["execution"] for order in device.worker if isinstance(order, Train)] == [None]
    assert device.texts("planned") == ["stage 1: frozen layers by torch, 16 images at a time (as configured)"]
    device.finish()
    world.settle(2)
    server.announce(round=2, content=b"newer" * 1000)
    server.assign(device.id, round=2)
    world.settle(2)
    assert device.worker[-1].order["execution"] == {"prefix": "torch", "micro_batch": 16}
    assert len(device.texts("planned")) == 1
    assert server.of(Offer)[0].report.execution.micro_batch == 16


def test_why_a_stage_begins_with_pixels_again_is_told(world):
    _, device = world.training()
    device.queue.append(WorkerRecomputes("another engine"))
    world.settle(0.2)
    assert device.texts("recomputes") == ["another engine"]


def test_a_repetition_under_another_torch_is_said(world):
    server, device = world.training()
    device.kill()
    again = world.start_device()
    world.settle()
    server.assign(again.id)
    world.settle(2)
    again.ready(torch="2.10")
    world.settle(0.2)
    assert "torch 2.9" in again.texts("warning")[-1]
    assert again.journal.execution("demo", 1).torch == "2.10"


def begun_with(world, prefix):
    """A device that is started again within a stage that it began with ONNX Runtime 1.20 there."""
    server, device = world.joined()
    server.announce()
    server.assign(device.id)
    world.settle(2)
    device.ready(onnxruntime="1.20")
    world.settle(0.2)
    device.queue.append(WorkerPlanned(prefix=prefix, micro_batch=16, reason="faster", needs_mb=250.0))
    world.settle(0.2)
    assert device.journal.execution("demo", 1).prefix == prefix
    device.kill()
    again = world.start_device()
    world.settle()
    server.assign(again.id)
    world.settle(2)
    return again


def test_a_stage_that_onnx_runtime_began_is_planned_anew_under_another_and_that_is_said(world):
    again = begun_with(world, "onnx")
    again.ready(onnxruntime="1.21")
    world.settle(0.2)
    assert again.worker[-1].order["execution"] is None
    assert "prefix: onnx of ONNX Runtime 1.20, micro-batch: 16 and goes on with" in again.texts("warning")[-1]
    again.queue.append(WorkerPlanned(prefix="onnx", micro_batch=16, reason="faster", needs_mb=250.0))
    world.settle(0.2)
    assert again.journal.execution("demo", 1).onnxruntime == "1.21"


@pytest.mark.parametrize(("prefix", "version"), [("onnx", "1.20"), ("torch", "1.21")])
def test_a_stage_goes_on_as_it_began_where_what_computes_it_is_the_same(world, prefix, version):
    again = begun_with(world, prefix)
    again.ready(onnxruntime=version)
    world.settle(0.2)
    assert again.worker[-1].order["execution"] == {"prefix": prefix, "micro_batch": 16}


def killed_until_it_is_said(world, device):
    """A task whose training processes are killed as often as the agent bears."""
    for _ in range(4):
        if not isinstance(device.worker[-1], Train):
            device.ready()
            world.settle(0.2)
        device.queue.append(WorkerError("killed", "the training process ended by SIGTERM"))
        world.settle()


def test_a_task_whose_training_processes_are_killed_again_and_again_takes_less_memory_and_says_what_both_may_be(world):
    server, device = world.training()
    killed_until_it_is_said(world, device)
    (fail,) = server.of(Fail)
    assert fail.code == "memory"
    assert fail.reason.endswith("It is the 4th in this task: memory is probably short, unless somebody ends them all")
    assert fail.reason in device.texts("warning")[-1]
    assert "with the least memory, since memory is probably short: 4 images at a time" in device.texts("warning")[-2]
    server.assign(device.id)
    world.settle(2)
    killed_until_it_is_said(world, device)
    assert [effect.order["execution"] for effect in device.worker if isinstance(effect, Train)][-1] == LEAST
    assert [fail.code for fail in server.of(Fail)] == ["memory", "unfit"], "or each round would end so"

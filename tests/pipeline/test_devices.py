import subprocess
import sys

import pytest

from pipeline.clip_model import pick_device
from pipeline.devices import Seat, count_cores, count_threads, deal_seats, find_seat, name_device, take_seat
from pipeline.errors import ConfigError, StageError


@pytest.mark.parametrize(
    ("num_gpus", "tasks_per_gpu", "most", "devices"),
    [
        (0, 1, 8, []),
        (1, 1, 8, ["cuda:0"]),
        (1, 2, 8, ["cuda:0", "cuda:0"]),
        (2, 2, 8, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
        (2, 2, 3, ["cuda:0", "cuda:1", "cuda:0"]),
        (8, 1, 2, ["cuda:0", "cuda:1"]),
    ],
)
def test_seats_share_gpus_evenly_and_no_more_than_asked(
    num_gpus: int, tasks_per_gpu: int, most: int, devices: list[str]
) -> None:
    seats = deal_seats(num_gpus, tasks_per_gpu, cores=16, most=most)
    assert [seat.device for seat in seats] == devices
    assert all(devices.count(device) <= tasks_per_gpu for device in devices)
    assert sum(seat.threads for seat in seats) <= 16


@pytest.mark.parametrize(
    ("cores", "tasks", "threads"), [(16, 1, 16), (16, 3, 5), (16, 16, 1), (2, 16, 1), (1, 0, 1), (7, 2, 3)]
)
def test_tasks_share_the_cores(cores: int, tasks: int, threads: int) -> None:
    assert count_threads(cores, tasks) == threads


def test_threads_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_DECODE_THREADS", "12")
    assert count_threads(2, 2) == 12
    for wrong in ("0", "-1", "many", ""):
        monkeypatch.setenv("WINNOW_DECODE_THREADS", wrong)
        with pytest.raises(ConfigError, match="is not a number of threads"):
            count_threads(2, 2)


def test_a_gpu_needs_a_task() -> None:
    with pytest.raises(ConfigError, match="tasks per GPU: 0 is below 1"):
        deal_seats(1, 0, cores=4, most=4)


@pytest.mark.parametrize(
    ("addresses", "visible", "device"),
    [
        ([], None, "cpu"),
        (["0"], None, "cuda:0"),
        (["3", "4"], None, "cuda:3"),
        (["3"], "", "cuda:3"),
        (["3"], "2, 3", "cuda:1"),
        (["GPU-8f6d"], "GPU-1111,GPU-8f6d", "cuda:1"),
    ],
)
def test_sparks_addresses_become_torch_devices(addresses: list[str], visible: str | None, device: str) -> None:
    assert name_device(addresses, visible) == device


@pytest.mark.parametrize(("address", "visible"), [("1", "0"), ("GPU-8f6d", None), ("MIG-1/2", "0,1")])
def test_an_address_torch_cannot_open_is_refused(address: str, visible: str | None) -> None:
    with pytest.raises(StageError, match=f"Spark gave this task GPU '{address}'.*discovery script"):
        name_device([address], visible)


def test_cores_are_those_this_process_may_use() -> None:
    command = [sys.executable, "-c", "from pipeline.devices import count_cores; print(count_cores())"]
    alone = subprocess.run(["taskset", "-c", "0", *command], capture_output=True, text=True, check=True, timeout=60)
    assert int(alone.stdout) == 1 and count_cores() >= 1


def test_a_seat_decides_device_and_model_threads() -> None:
    """In a process of its own: a seat is taken for life."""
    code = """if True:
        import sys
        from pipeline.devices import Seat, find_seat, take_seat
        assert find_seat() is None
        take_seat(Seat("cuda:7", 4))
        assert "torch" not in sys.modules
        from pipeline.clip_model import pick_device
        import torch
        assert (pick_device("auto"), pick_device("cpu"), torch.get_num_threads()) == ("cuda:7", "cpu", 1)
        torch.set_num_threads(2)
        take_seat(Seat("cpu", 1))
        assert (pick_device("auto"), torch.get_num_threads()) == ("cpu", 1)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={"OMP_NUM_THREADS": "2"})
    assert find_seat() is None and pick_device("cuda:3") == "cuda:3"
    assert callable(take_seat) and Seat("cpu", 1).threads == 1

"""What memory there is, and what a transition takes of it."""

from __future__ import annotations

from crpt.replay import DomainSpec, memory


def test_memory_is_that_of_the_machine_and_of_every_control_group(tmp_path, monkeypatch):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job/task\n")
    task = tmp_path / "cgroup/job/task"
    task.mkdir(parents=True)
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    assert memory.available_memory() == 8000 * 1024
    for folder, limit in ((task, "max"), (task.parent, "5000000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("3000000\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 1000000\n")
    assert memory.available_memory() == 3_000_000


def test_memory_per_transition_is_a_frame_and_its_scalars():
    spec = DomainSpec(capacity=1, action_shape=(6,), state_shape=(18,))
    scalars = 6 * 4 + 18 * 8 + 4 + 4 + 1 + 1
    assert spec.bytes_per_step() <= 1.05 * (3 * 84 * 84 + scalars)

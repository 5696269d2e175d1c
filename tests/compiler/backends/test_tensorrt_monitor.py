"""Nested phases add up to one percentage that never falls."""

from planish.compiler.backends.tensorrt.monitor import ProgressTree


def test_a_child_fills_the_step_of_its_parent() -> None:
    told: list[int] = []
    tree = ProgressTree(told.append)
    tree.start("build", None, 4)
    tree.step("build", 0)
    tree.start("optimise", "build", 2)
    tree.step("optimise", 0)
    assert told == [25, 37]
    tree.step("optimise", 1)
    tree.finish("optimise")
    tree.step("build", 1)
    assert told == [25, 37, 50]
    tree.finish("build")
    assert told[-1] == 100


def test_a_name_can_come_back_without_turning_progress_back() -> None:
    told: list[int] = []
    tree = ProgressTree(told.append)
    tree.start("build", None, 2)
    for _ in range(3):
        tree.start("reformat", "build", 2)
        tree.step("reformat", 0)
        tree.step("reformat", 1)
        tree.finish("reformat")
    assert told == [25, 50]


def test_steps_of_unknown_phases_are_ignored() -> None:
    told: list[int] = []
    ProgressTree(told.append).step("never started", 3)
    assert told == []

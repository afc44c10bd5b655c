"""Races are found from the accesses that an interpreter makes one by one."""

import numpy as np
import pytest

from tests.tools.races import Accesses, Extent, Race

THREADS = 4
FIRST = 1024
PAIRS = [("store", "load"), ("load", "store"), ("store", "store")]


class Memory:
    """An array, and loads and stores of tensors of its elements."""

    def __init__(self):
        self.accesses = Accesses([Extent(FIRST, 64, 4)], THREADS)
        self.barrier = self.accesses.barrier

    def _of(self, where, mask):
        where = np.asarray(where)
        mask = np.ones(where.shape, bool) if mask is None else np.asarray(mask, bool)
        return (FIRST + 4 * where).astype(np.uint64), mask

    def load(self, where, program=0, mask=None, function="f"):
        self.accesses.read(program, function, *self._of(where, mask))

    def store(self, where, program=0, mask=None, value=0.0, function="f"):
        addresses, mask = self._of(where, mask)
        values = np.broadcast_to(np.float32(value), mask.shape)
        self.accesses.write(program, function, addresses, mask, values)


@pytest.fixture
def memory():
    return Memory()


ROW = np.arange(8)


def test_a_sum_belongs_to_its_threads(memory):
    for _ in range(2):
        memory.load(ROW)
        memory.store(ROW)


@pytest.mark.parametrize("again", [ROW[::-1], ROW.reshape(2, 4)], ids=["element", "shape"])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_threads_meet_behind_a_barrier_only(memory, first, second, again):
    getattr(memory, first)(ROW)
    memory.barrier()
    getattr(memory, second)(again)
    with pytest.raises(Race, match="another thread"):
        getattr(memory, first)(ROW)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_another_function_lays_out_otherwise(memory, first, second):
    getattr(memory, first)(ROW)
    with pytest.raises(Race, match="another thread"):
        getattr(memory, second)(ROW, function="g")


def test_all_threads_read_what_few_elements_hold(memory):
    memory.load(ROW[:2])
    memory.store(ROW[:2])
    with pytest.raises(Race, match="reads what another thread wrote"):
        memory.load(ROW[:2])


def test_an_element_that_several_read_is_nobodys(memory):
    memory.load(ROW * 0)
    with pytest.raises(Race, match="writes what another thread reads"):
        memory.store(ROW)


def test_elements_that_are_masked_access_nothing(memory):
    memory.load(ROW, mask=ROW % 2 == 0)
    memory.store(ROW[::-1], mask=ROW % 2 == 0)
    memory.store(ROW, mask=ROW < 0)


def test_one_store_writes_one_value_to_a_place(memory):
    memory.store(ROW * 0, value=1.0)
    memory.barrier()
    with pytest.raises(Race, match="two values"):
        memory.store(ROW * 0, value=ROW)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_no_barrier_between_programs(memory, first, second):
    getattr(memory, first)(ROW)
    memory.barrier()
    memory.load(ROW + 8)
    memory.load(ROW + 8, program=1)
    with pytest.raises(Race, match="another program"):
        getattr(memory, second)(ROW, program=1)


def test_outside_of_every_array(memory):
    with pytest.raises(IndexError, match="outside of every array"):
        memory.load(ROW + 60)

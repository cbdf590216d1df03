"""The order in which the jobs of a group begin, by itself."""

import threading

from qcomm.communicator.order import Order


class Jobs:
    """Jobs of an order on threads of their own, in the state that the test lets them reach."""

    def __init__(self, *alone):
        self.order, self.numbers = Order(), []
        for _ in alone:
            self.order.enqueue(self.numbers.append)
        self.begun = [threading.Event() for _ in alone]
        self.may_end = [threading.Event() for _ in alone]
        self.threads = [threading.Thread(target=self._run, args=item) for item in enumerate(alone)]

    def _run(self, number, alone):
        with self.order.turn(self.numbers[number], alone):
            self.begun[number].set()
            assert self.may_end[number].wait(30)

    def start(self, *numbers):
        for number in numbers:
            self.threads[number].start()

    def end(self, *numbers):
        for number in numbers:
            self.may_end[number].set()
            self.threads[number].join()

    def reach(self, *numbers):
        return all(self.begun[number].wait(30) for number in numbers)

    def running(self):
        return [number for number, event in enumerate(self.begun) if event.is_set()]


def test_a_job_begins_after_those_before_it_and_beside_them():
    jobs = Jobs(False, False, False)
    jobs.start(2, 1)
    assert jobs.running() == []
    jobs.start(0)
    assert jobs.reach(0, 1, 2)
    jobs.end(0, 1, 2)


def test_a_job_runs_alone():
    jobs = Jobs(False, True, False)
    jobs.start(0, 1, 2)
    assert jobs.reach(0) and jobs.running() == [0]
    jobs.end(0)
    assert jobs.reach(1) and jobs.running() == [0, 1]
    jobs.end(1)
    assert jobs.reach(2)
    jobs.end(2)


def test_a_job_that_fails_lets_the_next_one_begin():
    order, numbers = Order(), []
    for _ in range(3):
        order.enqueue(numbers.append)
    for number in numbers:
        try:
            with order.turn(number, alone=number == 1):
                raise ZeroDivisionError
        except ZeroDivisionError:
            continue
    assert numbers == [0, 1, 2]

"""Jobs that wait for a slot: one queue per project and model, first come first served."""

from collections import deque

from xim_agent.router.jobs import Job

Key = tuple[str, str]


class Queues:
    """`bytes`: of all bodies that wait."""

    def __init__(self) -> None:
        self._queues: dict[Key, deque[Job]] = {}
        self.bytes = 0

    def push(self, job: Job, now: float) -> None:
        self._enter(job, now).append(job)

    def push_first(self, job: Job, now: float) -> None:
        self._enter(job, now).appendleft(job)

    def _enter(self, job: Job, now: float) -> deque[Job]:
        job.queued_since, job.queued = now, True
        self.bytes += len(job.body)
        return self._queues.setdefault(job.key, deque())

    def remove(self, job: Job) -> None:
        """Does nothing for a job that does not wait."""
        if job.queued:
            job.queued = False
            self.bytes -= len(job.body)
            queue = self._queues[job.key]
            queue.remove(job)
            if not queue:
                del self._queues[job.key]

    def length(self, key: Key) -> int:
        return len(self._queues.get(key, ()))

    def jobs(self, key: Key | None = None) -> list[Job]:
        """In order; of all keys without `key`. A copy: the caller may remove what it sees."""
        if key is not None:
            return list(self._queues.get(key, ()))
        return [job for queue in self._queues.values() for job in queue]

    def waiting(self) -> list[Key]:
        """The keys that have jobs."""
        return list(self._queues)

"""The same work for many items, several at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from local.tools.command_line import UserError
from local.tools.progress import show_progress


def run_jobs(
    function: Callable, items: Sequence[tuple], jobs: int, title: str, unit: str
) -> tuple[list, list[str]]:
    """Call function(*item) in threads, `jobs` at a time, showing progress.

    Returns:
        (what it returned, in any order; the messages of its UserErrors, sorted). Any other error
        ends the work: items that have not begun are left.
    """
    results, faults = [], []
    with ThreadPoolExecutor(jobs) as pool, show_progress(title, len(items), unit) as bar:
        futures = [pool.submit(function, *item) for item in items]
        try:
            for future in as_completed(futures):
                try:
                    results.append(future.result())
                except UserError as fault:
                    faults.append(str(fault))
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else the pool would work on all items first
            raise
    return results, sorted(faults)

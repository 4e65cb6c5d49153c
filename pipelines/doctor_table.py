"""What the doctor finds, and how it is told: a line each, with the remedy beneath where something is wrong."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from instaflow.errors import InstaFlowError, of_the_system

OK, WARNING, FAILURE = "ok", "warning", "failure"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    state: str
    """ok, warning (something is slow, small or not there, and a run may still be fine) or failure."""
    words: str
    remedy: str = ""
    host: str = ""
    """Where it was found; empty where it is so on all hosts."""


def found(check: str, look: Callable[[], tuple[str, ...]]) -> Finding:
    """What `look` finds: state, words, and a remedy if it wants one; a failure where it raises what can be mended."""
    try:
        return Finding(check, *look())
    except InstaFlowError as error:
        return Finding(check, FAILURE, error.message, error.hint)
    except OSError as error:
        told = of_the_system(error) or InstaFlowError(str(error), "Choose another place, or ask who runs this machine")
        return Finding(check, FAILURE, told.message, told.hint)


def merged(hosts: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """The findings of all hosts, check by check: one where they are all alike, else each host's own."""
    checks = dict.fromkeys(one.check for findings in hosts.values() for one in findings)
    told = []
    for check in checks:
        own = [replace(one, host=host) for host, findings in hosts.items() for one in findings if one.check == check]
        alike = {replace(one, host="") for one in own}
        told += [*alike] if len(alike) == 1 and len(own) == len(hosts) else own
    return told


def lines(findings: Sequence[Finding]) -> list[str]:
    width = max(len(one.check) for one in findings)
    told = []
    for one in findings:
        where = f"{one.host}: " if one.host else ""
        told.append(f"{one.check:<{width}}  {one.state:<7}  {where}{one.words}")
        told += [f"{'':<{width}}  {one.remedy}"] if one.remedy and one.state != OK else []
    return told

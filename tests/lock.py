"""python tests/lock.py [audit]: write constraints.txt anew, or look whether weaknesses are known of what it lists.

It lists the versions that this environment has of all that pyproject.toml asks for, with every extra, but for torch,
whose one pin stands there. A version that an allowed Python cannot install gets a marker, and is free there.
The audit is that of pip-audit, by the advisories of PyPI. Without its service nothing is audited, which is said.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")  # those that the lock is for, as `requires-python` allows them
ANSWER, LONGEST = 10, 120  # seconds: for one answer of the service, and for the whole audit
FREE = ("torch", "pip")  # not in the lock
HEAD = """\
# The exact version of every package that is installed, whichever extra asks for it; `make lock` writes it.
# A constraint binds what is installed and asks for nothing: what one system alone needs (CUDA, macOS) is free there.
# torch is left out, whose one pin stands in pyproject.toml, and pip, which would replace itself. There are no hashes:
# pip takes all or none, the checkout itself has none, and torch's differ between the builds for CPU and CUDA.
"""


def asked() -> list[Requirement]:
    """What pyproject.toml asks for, with every extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(r) for r in chain(project["dependencies"], *project["optional-dependencies"].values())]


def reached() -> tuple[dict[str, metadata.Distribution], set[str]]:
    """What `asked` needs here, by name: what is installed, and the names of what is not."""
    todo, done, found, missing = asked(), set(), {}, set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        try:
            found[name] = distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing.add(name)
            continue
        for extra in {"", *requirement.extras} - {e for n, e in done if n == name}:
            done.add((name, extra))
            inner = map(Requirement, distribution.requires or [])
            todo += [r for r in inner if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found, missing


def line(name: str, distribution: metadata.Distribution) -> str:
    allowed = SpecifierSet(distribution.metadata["Requires-Python"] or "")
    able = [p for p in PYTHONS if allowed.contains(f"{p}.99")]
    marker = "" if able == list(PYTHONS) else f' ; python_version >= "{able[0]}" and python_version <= "{able[-1]}"'
    return f"{name}=={distribution.version}{marker}"


def advisories(listed: str) -> list[dict] | str:
    """What pip-audit finds for each requirement of a list, or why it finds nothing out."""
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json"]
    command += ["--progress-spinner", "off", "--timeout", str(ANSWER), "--requirement"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(listed)
        file.flush()
        try:
            done = subprocess.run([*command, file.name], capture_output=True, text=True, check=False, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return f"no answer within {LONGEST} s"
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return " ".join(done.stderr.split())[-300:]
    return found if any("skip_reason" not in p for p in found) else found[0]["skip_reason"]


def audit() -> int:
    """1 where advisories are known, which are listed; 0 where none is, or where the service does not answer."""
    torch = next(str(r) for r in asked() if r.name == "torch")
    for listed in (torch, LOCK.read_text(encoding="utf-8") + torch):  # one package tells soon if there is a service
        found = advisories(listed)
        if isinstance(found, str):
            print(f"NOT AUDITED: the service of advisories does not answer ({found})")
            return 0
    unknown = [p["name"] for p in found if "skip_reason" in p]
    bad = [(p, v) for p in found for v in p.get("vulns", [])]
    for package, advisory in bad:
        fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {advisory['id']}, mended in {fixed}", file=sys.stderr)
    rest = f"; not known to the service: {', '.join(unknown)}" if unknown else ""
    print(f"audited: {len(found) - len(unknown)} packages, {len(bad)} advisories{rest}")
    return int(bool(bad))


def main() -> int:
    if sys.argv[1:] == ["audit"]:
        return audit()
    found, missing = reached()
    if missing:
        print(f"not installed: {', '.join(sorted(missing))}; make test installs every extra", file=sys.stderr)
        return 1
    lines = [line(name, found[name]) for name in sorted(found) if name not in FREE]
    if local := [each for each in lines if "+" in each]:  # a build that the registry does not have
        print(f"not of the registry: {', '.join(local)}; install the public version", file=sys.stderr)
        return 1
    LOCK.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{LOCK.name}: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())

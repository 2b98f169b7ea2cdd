"""List the licences of what segheads depends on, as the packages that are installed say them."""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

HEAD = """# Licences of dependencies

What `pip install "segheads[recipes,tiff,coco,parquet,export,demo]"` brings, as the packages themselves say; made by
`python requirements/licences.py`.

| package | licence |
|---|---|
"""
EXTRAS = {"recipes", "tiff", "coco", "parquet", "export", "demo"}


def names_of(package: str, extras: set[str] = frozenset()) -> set[str]:
    """The packages that one needs, and what these need in turn, as far as they are installed here."""
    found, todo = set(), [(package, extras)]
    while todo:
        name, wanted = todo.pop()
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(distribution(name).metadata["Name"])
        for need in needs:
            extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", need)
            other = re.split(r"[\s;<>=!~\[(]", need)[0]
            known = {x.lower() for x in found}
            if (extra is None or extra[1] in wanted) and other.lower() not in known:
                todo.append((other, frozenset()))
    return found


def licence_of(package: str) -> str:
    """What a package says of its licence, in a few words."""
    about = distribution(package).metadata
    if about.get("License-Expression"):
        return about["License-Expression"]
    kinds = [x.rsplit(" :: ", 1)[-1] for x in about.get_all("Classifier") or [] if x.startswith("License :: ")]
    said = (about.get("License") or "").strip().partition("\n")[0]
    return "; ".join(kinds) or said[:60] or "not said"


def main() -> None:
    """Write licences.md beside this file."""
    packages = sorted(names_of("segheads", EXTRAS) - {"segheads"}, key=str.lower)
    rows = [f"| {name} | {licence_of(name)} |" for name in packages]
    path = Path(__file__).with_name("licences.md")
    path.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} packages in {path}")


if __name__ == "__main__":
    main()

"""Turn Markdown files into calibration text: a JSON object with the field `text` on each line, a section to a line."""

import json
import re
import sys
from pathlib import Path


def main(output: Path, files: list[Path]) -> None:
    """Write every section with at least a few sentences in it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = 0
    with output.open("w", encoding="utf-8") as lines:
        for file in files:
            for section in re.split(r"^#+ ", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
                if len(section) > 200:
                    lines.write(json.dumps({"text": section.strip()}, ensure_ascii=False) + "\n")
                    kept += 1
    print(f"{output}: {kept} sections of {len(files)} files")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])

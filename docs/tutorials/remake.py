"""Run the notebooks of this folder anew and keep what they print and draw: `python docs/tutorials/remake.py [NAME]`.

Needs `pip install -e '.[docs]'`. A new notebook is a file NAME.ipynb with cells and no outputs.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def remake(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in book.cells:
        # When it ran, and on which kernel, would be another diff each time.
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "alt"}
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(book, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.ipynb")):
        print(name, flush=True)
        remake(HERE / f"{name}.ipynb")

"""Several sources learned together: what each name means, and how often its records are seen.

Knows where a name is looked up: dataset_info.json, files, the catalogue, the Hub. How samples of shares are ordered is
batches.py's; a mixture knows numbers of records only once its parts are encoded (joined.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from onecard.config.data import TOY_DATA, DataPortion, column_names, data_portions
from onecard.config.given_paths import shipped_file
from onecard.console import nearest
from onecard.data.catalogue.entries import entries
from onecard.data.catalogue.place import downloaded
from onecard.data.dataset_info import FILE_NAME, description_in, names_in
from onecard.data.description import DatasetDescription
from onecard.data.plain_text import TxtSplit
from onecard.data.sources import Source, source_of
from onecard.errors import DataError
from onecard.installation import command


class _MixingOptions(Protocol):
    data_path: Any
    data: Any
    columns: str
    txt_split: TxtSplit


@dataclass(frozen=True)
class MixturePart:
    """One source of a mixture: its name, what is read, and how often each of its records is in an epoch."""

    name: str
    source: Source
    amount: float = 1.0

    @property
    def label(self) -> str:
        """The name with its amount, as typed."""
        return self.name + DataPortion(self.name, self.source.limit, self.amount).suffix


def parts_of(options: _MixingOptions) -> list[MixturePart]:
    """The parts that options such as `config.DataOptions` name: those of --data, or all of --data_path as one.

    Raises DataError: a name that means nothing, or that stands there twice.
    """
    portions = data_portions(options.data)
    if not portions:
        source = source_of(options)
        return [MixturePart(source.name, source)]
    folder = _folder(options.data_path)
    parts = [_part(portion, folder, options) for portion in portions]
    names = [part.name for part in parts]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise DataError(f"--data names {twice} twice; {twice}:2 has each of its records twice in an epoch", twice)
    return parts


def _folder(data_path: Any) -> Path | None:
    """The folder in which names are looked up first, if one was given."""
    paths = data_path if isinstance(data_path, list) else [data_path]
    path = Path(paths[0]).expanduser()
    if len(paths) == 1 and path.is_dir():
        return path
    if len(paths) == 1 and TOY_DATA.resolve() in path.resolve().parents:
        return None  # the default, which nobody typed
    raise DataError("with --data this is the folder that has its names (dataset_info.json); add files to --data itself",
                    f"--data_path {', '.join(map(str, paths))}")  # fmt: skip


def _part(portion: DataPortion, folder: Path | None, options: _MixingOptions) -> MixturePart:
    name = portion.name
    base = Source((), column_names(options.columns) or (), options.txt_split, None, portion.limit)
    if folder is not None and name in names_in(folder):
        described = _of_description(description_in(folder, name), base, folder)
        return MixturePart(name, described, portion.amount)
    places = [folder / name] if folder is not None else []
    for path in (*places, Path(shipped_file(name)).expanduser()):
        if path.exists():
            return MixturePart(path.name, replace(base, paths=(str(path),)), portion.amount)
    known = entries()
    entry = known.get(name) or known.get(name.lower())
    if entry is not None:
        here = downloaded(entry.name)
        description = entry.data if here is None else description_in(here, entry.name)
        source = _of_description(description, replace(base, collection=entry.name), here)
        return MixturePart(entry.name, source, portion.amount)
    if "/" in name and not Path(name).suffix:
        return MixturePart(name, replace(base, paths=(name,)), portion.amount)
    own = names_in(folder) if folder is not None else []
    where = f"{folder / FILE_NAME}, " if own and folder is not None else ""
    raise DataError(
        f"there is no data set of this name{nearest(name, [*own, *known])}: it is in neither {where}the files here nor "
        f"the catalogue ({command('data')} list)",
        f"--data {name}",
    )


def _of_description(description: DatasetDescription, base: Source, folder: Path | None) -> Source:
    """What a description says is read: the files in `folder` where they are there, else those of the Hub."""
    limit = min(filter(None, (base.limit, description.num_samples)), default=0)
    source = replace(base, description=description, limit=limit)
    if folder is not None and description.file_name:
        path = folder / description.file_name
        if not path.exists():
            raise DataError(f"{description.name} is described to be this file, which is not there", str(path))
        return replace(source, paths=(str(path),))
    if not description.hf_hub_url:
        raise DataError(
            f"{description.name} lies on ModelScope only ({description.ms_hub_url}): {command('data')} get "
            f"{description.name} brings it here",
            f"--data {description.name}",
        )
    return replace(source, paths=(description.hf_hub_url,))

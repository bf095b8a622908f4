"""A recipe: TOML in, frozen pydantic models out. Unknown keys get the nearest name; all mistakes are told at once."""

from __future__ import annotations

import difflib
import inspect
import json
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from sslpre.errors import SslpreError
from sslpre.shelf import names, text

Auto = Literal["auto"]
Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class Table(BaseModel):
    # strict: a string or a boolean is no number. Values pass through JSON, where a list may be a tuple.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class View(Table):
    """One `[[views]]` table: how a random view of an image is drawn.

    Probabilities lie in [0, 1]; factors are as torchvision's ColorJitter reads them; `blur_kernel` is a fraction of the
    view's side, `size` its side in pixels (0: the image size).
    """

    copies: Positive = 1
    size: Annotated[int, Field(ge=0)] = 0
    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.08, 1.0)
    crop_ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (3 / 4, 4 / 3)
    flip: Unit = 0.5
    jitter: Unit = 0.0
    brightness: Annotated[float, Field(ge=0)] = 0.0
    contrast: Annotated[float, Field(ge=0)] = 0.0
    saturation: Annotated[float, Field(ge=0)] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    gray: Unit = 0.0
    blur: Unit = 0.0
    blur_kernel: Annotated[float, Field(gt=0, le=1)] = 0.1
    blur_sigma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.1, 2.0)
    kornia: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def ranges_rise(self) -> View:
        for key in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"`{key}` must rise, not `[{low}, {high}]`")
        return self


class EncoderTable(Table):
    backbone: str = "auto"
    stem: Literal["auto", "timm", "small"] = "auto"
    image_size: Annotated[int, Field(ge=8, le=4096)] | Auto = "auto"
    init: str = ""  # where the weights start: "" fresh, "pretrained" timm's, or the path of a file, an export or a run
    mean: tuple[Unit, Unit, Unit] = (0.485, 0.456, 0.406)
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (
        0.229,
        0.224,
        0.225,
    )
    model_args: dict[str, Any] = {}  # of timm's network besides its size, such as { num_heads = 12 }

    @field_validator("model_args")
    @classmethod
    def plain(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name, item in arguments.items():
            for one in item if isinstance(item, list) else [item]:
                if not isinstance(one, str | int | float) or one != one:
                    raise ValueError(f"`encoder.model_args.{name} = {item}`: only numbers, words, true and false")
        return arguments


class DataTable(Table):
    images: str = ""  # "" is the built-in sample set
    store_size: Annotated[int, Field(ge=8, le=4096)] | Auto = "auto"
    max_bad: Unit = 0.01
    max_pixels: Positive = 200_000_000


class OptimTable(Table):
    name: Literal["sgd", "adamw", "lars"] = "adamw"
    lr: Annotated[float, Field(gt=0)] | Auto = "auto"
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    trust: Annotated[float, Field(gt=0)] = 0.001
    warmup: Unit | Auto = "auto"  # share of the run in which the rate rises
    nesterov: bool = False  # of sgd only
    steps: tuple[Unit, ...] = ()  # shares of the run after which the rate falls by `factor`; none: half a cosine
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1


class TrainTable(Table):
    epochs: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = "auto"
    batch_size: Positive | Auto = "auto"
    micro_batch: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0
    on_collapse: Literal["warn", "stop"] = "warn"
    monitor: Literal["none", "knn"] = "none"


class Recipe(Table):
    """The whole recipe. `method` holds the method's name and, as read by `method_arguments`, its keyword arguments."""

    method: dict[str, Any]
    encoder: EncoderTable = EncoderTable()
    data: DataTable = DataTable()
    views: tuple[View, ...] = (View(),)
    optim: OptimTable = OptimTable()
    train: TrainTable = TrainTable()

    def edit(self, **tables: Mapping[str, Any]) -> Recipe:
        """A copy with some keys of some tables replaced: `recipe.edit(train={"epochs": 3})`."""
        plain = self.model_dump()
        for table, keys in tables.items():
            plain[table] = {**plain[table], **keys}
        return parse(plain, "edited recipe")


def load(name: str, settings: Iterable[str] = (), overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Recipe:
    """Read recipe `name` (a shipped name or a path to a .toml), then apply `--set` settings, then flags.

    Raises SslpreError (exit 2) for an unknown recipe, a file that is not TOML, and for all unfit keys at once.
    """
    plain = read(name)
    for setting in settings:
        apply_setting(plain, setting)
    for table, keys in (overrides or {}).items():
        if isinstance(plain.setdefault(table, {}), dict):  # else `parse` says what is wrong with it
            plain[table].update(keys)
    return parse(plain, name)


def read(name: str) -> dict[str, Any]:
    path = Path(name)
    if name.endswith(".toml"):
        if not path.is_file():
            raise SslpreError(f"no recipe file `{name}`", "sslpre recipes lists the recipes that are built in")
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SslpreError(
                f"recipe `{name}` cannot be read: {error}", "sslpre recipes simclr > mine.toml"
            ) from error
    elif name in names():
        source = text(name)
    else:
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        raise SslpreError(f"no recipe `{name}`", f"sslpre pretrain {near[0]} ./images" if near else "sslpre recipes")
    try:
        return tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise SslpreError(f"recipe `{name}` is not TOML: {error}", "compare with: sslpre recipes simclr") from error


def apply_setting(plain: dict[str, Any], setting: str) -> None:
    """Write one `table.key=value` into `plain`. The value is TOML; what is not TOML is taken as a string."""
    path, equals, raw = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise SslpreError(
            f"cannot read `--set {setting}`", "write it as --set table.key=value, e.g. --set method.temperature=0.2"
        )
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    at: Any = plain
    for key in keys[:-1]:
        if isinstance(at, list):
            if not key.isdigit() or int(key) >= len(at):
                raise SslpreError(
                    f"no table `{path}`: there are {len(at)} [[views]]", "count from 0, e.g. --set views.0.gray=0"
                )
            at = at[int(key)]
        elif isinstance(at, dict):
            at = at.setdefault(key, {})
        else:
            raise SslpreError(f"`{path}` goes below a plain value", "write it as --set table.key=value")
    if not isinstance(at, dict):
        raise SslpreError(f"cannot set `{path}`", "name one view by number, e.g. --set views.0.gray=0")
    at[keys[-1]] = value


def parse(plain: Mapping[str, Any], name: str) -> Recipe:
    """Validate a plain recipe, its [method] table against the method's signature. Raises SslpreError (exit 2)."""
    mistakes: list[str] = []
    recipe: Recipe | None = None
    try:
        passed = json.dumps(plain, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SslpreError(f"recipe `{name}` holds text that is not UTF-8", "rename what it names", 2) from error
    try:
        recipe = Recipe.model_validate_json(passed)
    except ValidationError as error:
        mistakes += explain(error, Recipe)
    method = plain.get("method")
    if isinstance(method, Mapping):
        try:
            arguments = method_arguments(method)
        except ValidationError as error:
            mistakes += explain(error, signature_model(str(method["name"])), "method.")
    if mistakes or recipe is None:
        kind = f"recipe `{name}`: " if len(mistakes) == 1 else f"{len(mistakes)} mistakes in recipe `{name}`: "
        raise SslpreError(kind + "; ".join(mistakes), "sslpre recipes simclr shows a complete recipe")
    return recipe.model_copy(update={"method": {"name": method["name"], **arguments}})  # type: ignore[index]


def method_arguments(table: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the method that `table` names, validated and completed with defaults."""
    from sslpre.methods import methods

    known = methods()
    name = table.get("name")
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4) or sorted(known)
        raise SslpreError(f"no method `{name}`", f'write name = "{near[0]}" in the [method] table')
    rest = {key: value for key, value in table.items() if key != "name"}
    return signature_model(name).model_validate_json(json.dumps(rest, default=str)).model_dump()


def signature_model(name: str) -> type[Table]:
    """A method's keyword arguments as a model: names, types, ranges and defaults stand once, in its `__init__`."""
    from sslpre.methods import methods

    init = methods()[name].__init__
    hints = typing.get_type_hints(init, include_extras=True)
    fields: dict[str, Any] = {}
    for key, parameter in list(inspect.signature(init).parameters.items())[2:]:  # after self and setup
        fields[key] = (hints[key], ... if parameter.default is inspect.Parameter.empty else parameter.default)
    return create_model(name, __base__=Table, **fields)


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """Each mistake in words: where it is, what was found, what would be right; one line a place."""
    told: dict[str, str] = {}
    for one in error.errors():
        path = [str(part) for part in one["loc"] if not is_a_type(str(part))]
        where = prefix + ".".join(path)
        message = one["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if one["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(one["loc"][-1]), fields_at(model, one["loc"][:-1]), n=1, cutoff=0.5)
            told[where] = f"unknown key `{where}`" + (f", did you mean `{near[0]}`?" if near else "")
        elif one["type"] == "value_error":
            told[message] = message
        elif where in told:
            told[where] += message.replace("input should be", " or")
        else:
            told[where] = f"`{where} = {one.get('input')}`: {message}"
    return list(told.values())


def is_a_type(part: str) -> bool:
    """pydantic names the branch of a union in the place of a mistake: `int`, `constrained-int`, `literal['auto']`."""
    return part in ("int", "float", "str") or part.startswith(("literal[", "constrained-", "function-"))


def fields_at(model: type[BaseModel], loc: Iterable[Any]) -> list[str]:
    """Names of the keys that the table at `loc` may have."""
    at: Any = model
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = at.model_fields[part].annotation
        arguments = [a for a in typing.get_args(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        at = arguments[0] if arguments else annotation
    return list(at.model_fields)


def write(recipe: Recipe, header: str = "") -> str:
    """The recipe as TOML that `load` reads back to an equal recipe. `header` becomes comment lines above it."""
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    plain = recipe.model_dump()
    views = plain.pop("views")
    for table, keys in plain.items():
        lines += ["", f"[{table}]", *(f"{key} = {value(v)}" for key, v in keys.items())]
    for view in views:
        lines += ["", "[[views]]", *(f"{key} = {value(v)}" for key, v in view.items())]
    return "\n".join(lines).lstrip("\n") + "\n"


def value(item: Any) -> str:
    """One TOML value: strings, numbers, booleans, lists and inline tables are all that a recipe holds."""
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, str):
        return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(item, (list, tuple)):
        return "[" + ", ".join(value(one) for one in item) + "]"
    if isinstance(item, dict):
        if not item:
            return "{}"
        return "{ " + ", ".join(f"{value(key)} = {value(one)}" for key, one in item.items()) + " }"
    if isinstance(item, (int, float)):
        return repr(item)
    raise TypeError(f"a recipe cannot hold a {type(item).__name__}")

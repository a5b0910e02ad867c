"""One wrapper for every structure that KVM reads or writes.

A :class:`Struct` has the kernel's field names as attributes, prints addresses and flags
in hex, and converts to and from dict, bytes and numpy through the memory that it wraps,
never byte by byte. Paddings and reserved fields stay hidden; a table (``struct
kvm_cpuid2`` and its like) knows how many entries are in use. Structures compare by
content, and survive pickling.

>>> regs = Struct("kvm_regs", rip=0x1000, rflags=2)
>>> regs.rip += 4
>>> hex(regs.rip), regs.to_dict()["rflags"]
('0x1004', 2)
>>> Struct.from_bytes("kvm_regs", bytes(regs)) == regs
True
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from typing import Any, Self, overload

from kvmhost._ffi import ffi

if typing.TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Array", "Struct", "np_dtype"]

#: Structures with entries at their end: the field that counts them, and the entries.
_TABLES = {
    "kvm_coalesced_mmio_ring": ("", "coalesced_mmio"),
    "kvm_cpuid": ("nent", "entries"),
    "kvm_cpuid2": ("nent", "entries"),
    "kvm_irq_routing": ("nr", "entries"),
    "kvm_msr_list": ("nmsrs", "indices"),
    "kvm_msrs": ("nmsrs", "entries"),
    "kvm_pmu_event_filter": ("nevents", "events"),
    "kvm_reg_list": ("n", "reg"),
    "kvm_signal_mask": ("len", "sigset"),
    "kvm_stats_desc": ("", "name"),
    "kvm_xsave": ("", "extra"),
}

#: Which member of a union is valid: the field that selects it, and the members by its value.
_UNIONS: dict[str, tuple[str, dict[int, str]]] = {
    "kvm_irqchip": ("chip_id", {0: "pic", 1: "pic", 2: "ioapic"}),
    "kvm_irq_routing_entry": ("type", {1: "irqchip", 2: "msi", 4: "hv_sint", 5: "xen_evtchn"}),
}

#: Fields that people count rather than read as bits; the others print in hex.
_DECIMAL = frozenset(
    {
        "bank",
        "chip_id",
        "conn_id",
        "count",
        "cpu",
        "fd",
        "gsi",
        "irq",
        "len",
        "level",
        "mp_state",
        "n",
        "nent",
        "nevents",
        "nmsrs",
        "nr",
        "nr_xcrs",
        "num_desc",
        "num_pages",
        "pin",
        "pio",
        "pit_reinject",
        "port",
        "priority",
        "ring_index",
        "size",
        "slot",
        "vcpu",
        "vcpu_id",
        "name_size",
        "exponent",
        "bucket_size",
    }
)


class Struct:
    """A kernel structure, by its C name without ``struct``.

    :param ctype: for example ``kvm_regs``
    :param fields: values by field name; nested structures as dicts, tables as lists
    :raises AttributeError: for a field that the structure does not have
    :raises OverflowError: for a number that does not fit its field
    """

    __slots__ = ("_owner", "_pointer", "ctype")
    __hash__ = None  # type: ignore[assignment]

    ctype: str

    def __init__(self, ctype: str, /, **fields: Any) -> None:
        pointer = _allocate(ctype, fields)
        self._wrap(ctype, pointer, pointer)
        for name, value in fields.items():
            setattr(self, name, value)

    @classmethod
    def view(cls, ctype: str, pointer: Any, owner: Any) -> Self:
        """Wrap memory that another object owns.

        :param pointer: cffi pointer to the structure
        :param owner: what keeps that memory alive; held as long as the view
        """
        made = cls.__new__(cls)
        made._wrap(ctype, pointer, owner)
        return made

    @classmethod
    def table(cls, ctype: str, n_entries: int, **fields: Any) -> Self:
        """Make a structure with room for ``n_entries`` and a count of as many.

        >>> len(Struct.table("kvm_msrs", 3).entries)
        3
        """
        counter, entries = _TABLES[ctype]
        pointer = ffi.new(f"struct {ctype} *", {entries: n_entries})
        made = cls.view(ctype, pointer, pointer)
        if counter:
            setattr(pointer, counter, n_entries)
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    @classmethod
    def from_dict(cls, ctype: str, values: Mapping[str, Any]) -> Self:
        """Make a structure from what :meth:`to_dict` returned; absent fields are 0."""
        return cls(ctype, **values)

    @classmethod
    def from_bytes(cls, ctype: str, data: Any) -> Self:
        """Copy a structure out of anything with the buffer protocol.

        :raises ValueError: if the size is not that of the structure
        """
        source = memoryview(data).cast("B")
        fixed = ffi.sizeof(f"struct {ctype}")
        if ctype in _TABLES:
            name = _TABLES[ctype][1]
            item = ffi.sizeof(_fields(f"struct {ctype}")[name].type.item)
            start = ffi.offsetof(f"struct {ctype}", name)
            made = cls.table(ctype, max(0, len(source) - start) // item)
            fixed = start + len(made._entries()) * item
        else:
            made = cls(ctype)
        if len(source) != fixed:
            raise ValueError(f"struct {ctype}: {len(source)} bytes, need {fixed}")
        made.raw()[:] = source
        return made

    @property
    def pointer(self) -> Any:
        """The cffi pointer, for calls into the C core."""
        return self._pointer

    def raw(self) -> memoryview:
        """Return the bytes in place: writable, no copy."""
        return _memory(self._owner, self._pointer, self._n_bytes())

    def numpy(self) -> npt.NDArray[np.void]:
        """Return a numpy view on the structure (shape ``()``), for fields by name.

        >>> Struct("kvm_regs", rax=7).numpy()["rax"].item()
        7
        """
        import numpy as np

        dtype = np_dtype(self.ctype)
        return np.frombuffer(self.raw()[: dtype.itemsize], dtype).reshape(())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: ints, lists, dicts, and bytes for arrays of bytes.

        Of a union, the member that is valid.
        """
        return {name: _plain(getattr(self, name)) for name in self._names()}

    def update(self, **fields: Any) -> None:
        """Set several fields."""
        for name, value in fields.items():
            setattr(self, name, value)

    def copy(self) -> Struct:
        """Return an independent structure with the same content."""
        return Struct.from_bytes(self.ctype, self.raw())

    def _wrap(self, ctype: str, pointer: Any, owner: Any) -> None:
        # SAFETY: this object references the owner, so the pointer stays valid.
        object.__setattr__(self, "ctype", ctype)
        object.__setattr__(self, "_pointer", pointer)
        object.__setattr__(self, "_owner", owner)

    def _n_bytes(self) -> int:
        if self.ctype not in _TABLES:
            return int(ffi.sizeof(self._pointer[0]))
        name = _TABLES[self.ctype][1]
        entries = self._entries()
        item = ffi.sizeof(_fields(f"struct {self.ctype}")[name].type.item)
        return int(ffi.offsetof(f"struct {self.ctype}", name)) + len(entries) * int(item)

    def _entries(self) -> Array:
        return typing.cast(Array, getattr(self, _TABLES[self.ctype][1]))

    def _names(self) -> list[str]:
        names = [name for name, _ in ffi.typeof(self._pointer[0]).fields or ()]
        return [name for name in names if not name.startswith(("pad", "reserved"))]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            value = getattr(self._pointer, name)
        except AttributeError:
            raise self._no_field(name) from None
        if not isinstance(value, ffi.CData):
            return value
        return self._nested(name, value)

    def _nested(self, name: str, value: Any) -> Any:
        kind = ffi.typeof(value)
        if kind.kind == "struct":
            return Struct.view(_plain_name(kind), ffi.addressof(value), self._owner)
        if kind.kind == "union":
            return Union.of(self, value, self._owner)
        if kind.kind == "pointer":
            return int(ffi.cast("uintptr_t", value))
        length = len(value)
        counter = _TABLES.get(self.ctype, ("", ""))
        if counter[1] == name and counter[0]:
            length = min(length, int(getattr(self._pointer, counter[0])))
        return Array(value, length, self._owner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(self._pointer, name):
            raise self._no_field(name)
        try:
            self._assign(name, value)
        except (OverflowError, TypeError, IndexError) as error:
            raise type(error)(f"{self.ctype}.{name}: {error}") from None

    def _assign(self, name: str, value: Any) -> None:
        if isinstance(value, Mapping) and isinstance(getattr(self, name), Struct):
            getattr(self, name).update(**value)
        elif isinstance(value, Struct):
            setattr(self._pointer, name, value._pointer[0])
        elif isinstance(value, list | tuple | Array) and isinstance(getattr(self, name), Array):
            getattr(self, name).assign(value)
        elif isinstance(value, int) and self._kind_of(name).kind == "pointer":
            setattr(self._pointer, name, ffi.cast(self._kind_of(name), value))
        else:
            setattr(self._pointer, name, value)

    def _kind_of(self, name: str) -> Any:
        return dict(ffi.typeof(self._pointer[0]).fields)[name].type

    def _no_field(self, name: str) -> AttributeError:
        return AttributeError(f"struct {self.ctype} has no field {name!r}: {self._names()}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._names()]

    def __bytes__(self) -> bytes:
        return self.raw().tobytes()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Struct):
            return NotImplemented
        return self.ctype == other.ctype and bytes(self) == bytes(other)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Struct.from_bytes, (self.ctype, bytes(self)))

    def __buffer__(self, flags: int) -> memoryview:
        return self.raw()

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={_show(name, getattr(self, name))}" for name in self._names())
        # cffi numbers the structures that have no name in C.
        return f"{'' if self.ctype.startswith('$') else self.ctype}({shown})"


class Union(Struct):
    """A union inside a structure: shows the member that the structure marks as valid."""

    __slots__ = ("_valid",)

    _valid: str

    @classmethod
    def of(cls, outer: Struct, value: Any, owner: Any) -> Union:
        """Wrap the union ``value`` of ``outer``."""
        made = cls.view(_plain_name(ffi.typeof(value)), ffi.addressof(value), owner)
        teller, members = _UNIONS.get(outer.ctype, ("", {}))
        valid = members.get(getattr(outer, teller), "") if teller else ""
        object.__setattr__(made, "_valid", valid)
        return made

    def _names(self) -> list[str]:
        return [self._valid] if self._valid else super()._names()


class Array:
    """An array inside a structure: a sequence, and a view for numpy."""

    __slots__ = ("_array", "_length", "_name", "_owner")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, array: Any, length: int, owner: Any, name: str = "") -> None:
        # SAFETY: the owner of the memory is held here.
        self._array, self._length, self._owner, self._name = array, length, owner, name

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Return one item (a structure as a view), or a list of items."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        return self._item(self._checked(index))

    def __setitem__(self, index: int, value: Any) -> None:
        at = self._checked(index)
        if isinstance(value, Struct):
            self._array[at] = value.pointer[0]
        elif isinstance(value, Mapping):
            self._item(at).update(**value)
        else:
            self._array[at] = value

    def __iter__(self) -> Iterator[Any]:
        return (self._item(i) for i in range(self._length))

    def assign(self, values: Any) -> None:
        """Overwrite the first ``len(values)`` items.

        :raises IndexError: if there are more values than items
        """
        if len(values) > self._length:
            raise IndexError(f"{len(values)} values for {self._length} items")
        for i, value in enumerate(values):
            self[i] = value

    def raw(self) -> memoryview:
        """Return the bytes in place: writable, no copy."""
        item = ffi.sizeof(ffi.typeof(self._array).item)
        return _memory(self._owner, self._array, self._length * item)

    def numpy(self) -> npt.NDArray[Any]:
        """Return a numpy view, shape ``(len(self), …)``."""
        import numpy as np

        return np.frombuffer(self.raw(), _dtype_of(ffi.typeof(self._array).item))

    def to_list(self) -> list[Any] | bytes:
        """Return plain values; arrays of bytes as bytes."""
        if _is_byte(ffi.typeof(self._array).item):
            return self.raw().tobytes()
        if ffi.typeof(self._array).item.kind == "primitive":
            return list(ffi.unpack(self._array, self._length)) if self._length else []
        return [_plain(item) for item in self]

    def __bytes__(self) -> bytes:
        return self.raw().tobytes()

    def __buffer__(self, flags: int) -> memoryview:
        return self.raw()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, bytes):
            return bytes(self) == other
        if isinstance(other, Array | list | tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    def __repr__(self) -> str:
        if _is_byte(ffi.typeof(self._array).item):
            return bytes(self).hex() or "''"
        return "[" + ", ".join(_show(self._name, item) for item in self) + "]"

    def _checked(self, index: int) -> int:
        at = index + self._length if index < 0 else index
        if not 0 <= at < self._length:
            raise IndexError(f"item {index} of {self._length}")
        return at

    def _item(self, index: int) -> Any:
        value = self._array[index]
        if not isinstance(value, ffi.CData):
            return value
        kind = ffi.typeof(value)
        if kind.kind == "array":
            return Array(value, len(value), self._owner, self._name)
        return Struct.view(_plain_name(kind), ffi.addressof(self._array, index), self._owner)


def np_dtype(ctype: str) -> np.dtype[Any]:
    """Return the numpy dtype of a structure: kernel's names, offsets and size.

    Entries at the end of a table are not part of it.
    """
    return _dtype_of(ffi.typeof(f"struct {ctype}"))


def _allocate(ctype: str, fields: Mapping[str, Any]) -> Any:
    counter, entries = _TABLES.get(ctype, ("", ""))
    given = fields.get(entries) if entries else None
    if given is None:
        return ffi.new(f"struct {ctype} *")
    pointer = ffi.new(f"struct {ctype} *", {entries: len(given)})
    if counter:
        setattr(pointer, counter, len(given))
    return pointer


def _memory(owner: Any, part: Any, n_bytes: int) -> memoryview:
    # SAFETY: a pointer to a part does not keep the whole alive, a buffer of the whole does.
    offset = int(ffi.cast("uintptr_t", part)) - int(ffi.cast("uintptr_t", owner))
    return memoryview(ffi.buffer(owner, offset + n_bytes))[offset:]


def _fields(cname: str) -> dict[str, Any]:
    return dict(ffi.typeof(cname).fields)


def _plain_name(kind: Any) -> str:
    return str(kind.cname).removeprefix("struct ").removeprefix("union ")


def _is_byte(kind: Any) -> bool:
    return bool(kind.kind == "primitive" and ffi.sizeof(kind) == 1)


def _plain(value: Any) -> Any:
    if isinstance(value, Struct):
        return value.to_dict()
    return value.to_list() if isinstance(value, Array) else value


def _show(name: str, value: Any) -> str:
    if not isinstance(value, int) or value < 0 or name in _DECIMAL:
        return repr(value)
    return hex(value) if value > 9 else str(value)


def _dtype_of(kind: Any) -> np.dtype[Any]:
    import numpy as np

    if kind.kind == "array":
        return np.dtype((_dtype_of(kind.item), (kind.length,)))
    if kind.kind == "pointer":
        return np.dtype("<u8")
    if kind.kind == "primitive":
        signed = "i" if int(ffi.cast(kind, -1)) < 0 and kind.cname != "char" else "u"
        return np.dtype(f"<{signed}{ffi.sizeof(kind)}")
    fields = [f for f in kind.fields if f[1].type.kind != "array" or f[1].type.length is not None]
    return np.dtype(
        {
            "names": [name for name, _ in fields],
            "formats": [_dtype_of(field.type) for _, field in fields],
            "offsets": [field.offset for _, field in fields],
            "itemsize": ffi.sizeof(kind),
        }
    )

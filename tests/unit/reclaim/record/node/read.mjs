// Read the arrays of a record with zarrita.js and print them as JSON:
//
//     node read.mjs RECORD GFN WINDOW
//
// `young` and `coarse` are printed as the windows in which page GFN was young, and as the
// pages that were young in WINDOW, both counted from 0.
import * as zarr from "zarrita";
import FileSystemStore from "@zarrita/storage/fs";

const [path, page, window] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];

async function read(group, name) {
  const array = await zarr.open.v2(group.resolve(name), { kind: "array" });
  const { data, shape } = await zarr.get(array);
  return { shape, values: Array.from(data, Number), attrs: array.attrs };
}

async function bits(group, name, nWindows) {
  const { shape, values, attrs } = await read(group, name);
  const [nPages, nBytes] = shape;
  if (attrs.bit_order !== "big" || attrs.packed_dimension !== "window") {
    throw new Error(`${name}: unknown packing ${JSON.stringify(attrs)}`);
  }
  const isYoung = (i, w) => (values[i * nBytes + (w >> 3)] >> (7 - (w % 8))) & 1;
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  return {
    windows: range(nWindows).filter((w) => isYoung(page, w)),
    pages: range(nPages).filter((i) => isYoung(i, window)),
  };
}

async function readAll(store) {
  const group = await zarr.open.v2(store, { kind: "group" });
  const found = { meta: group.attrs.kvmhost_young };
  for (const name of ["n_young", "end_ns", "ages", "sum9"]) {
    const { shape, values } = await read(group, name);
    found[name] = { shape, values };
  }
  const nWindows = found.n_young.shape[0];
  for (const name of ["young", "coarse"]) {
    found[name] = await bits(group, name, nWindows);
  }
  return found;
}

const store = new FileSystemStore(path);
const consolidated = await zarr.withConsolidatedMetadata(store, { format: "v2" });
console.log(JSON.stringify([await readAll(consolidated), await readAll(store)]));

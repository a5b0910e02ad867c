"use strict";
// Draws the part of a record that is in view from a pyramid of counts: a cell of level L
// and step K says how often a page was young in 2^L pages and 2^K windows. Layers (where pages
// are, evictions, refaults) have pyramids of their own. Tiles are unpacked when they come into
// view. Windows are all drawn equally wide; what is between them is a line, of a gap a bar.
// Pages are numbered by their place in the picture: parts of memory may be left out.
(async () => {
  const $ = (id) => document.getElementById(id);
  const meta = JSON.parse($("meta").textContent);
  const map = $("map"), tip = $("tip"), root = document.documentElement;
  const N = meta.nPages, T = meta.nWindows;
  const MARGIN = { left: 92, right: 58, top: 20, bottom: 40 };
  const GAMMA = 0.45, LEAST = 0.0005, CACHED_TILES = 600;
  const MARK = 13; // width and height of a cell with marks of events, in pixels
  const EVENTS = {
    evicted_daemon: ["\u25bc", "evicted by the daemon", []],
    evicted_limit: ["\u25bc", "evicted at the limit", [6, 3]],
    evicted_request: ["\u25bc", "evicted on request", [7, 2, 1, 2]],
    evicted_memory: ["\u25bc", "evicted, no memory on the host", [1, 2]],
    refaulted: ["\u25b2", "refaulted", []],
  };
  const LUTS = {
    blues: "08306b083471083979083d7f08438708478d084c9508509b0b559f0e59a2125ea61562a91967ad1d6cb12070b42575b72a7ab92f7fbc3383be3888c13c8cc34191c64695c84d99ca539ecd58a1cf5fa6d164a9d36aaed671b1d779b5d97fb9da",
    "blues-dark": "135fa71764ab1c6ab02070b42676b82c7cba3282be3888c13e8ec44594c74b98ca539ecd5ba3d063a8d36aaed672b2d87cb7da85bcdc8fc2de97c6dfa0cbe2a8cee4afd1e7b7d4eabdd7ecc4daeecaddf0cee0f2d2e3f3d6e6f4dbe9f6dfecf7",
    viridis: "440154470d6048186a482374472e7c4538824241863e4a893a548c365d8d32658e2e6d8e2b758e287d8e25848e228c8d1f948c1e9c8920a38625ab822eb37c3aba7648c16e58c7656ccd5a7fd34e93d741a8db34c0df25d5e21aeae51afde725",
    cividis: "00224e00285b002e6a0533711c396f293f6e33446d3c4a6c45506c4d556c555b6d5c616e6467706b6d72727274787877807f78888578908b78979177a09875a89e73b0a571b9ab6dc2b369cbb965d3c05fdcc859e6d051efd748f8df3cfee838",
  };

  // -- reading what is embedded ---------------------------------------------

  async function inflate(letters) {
    const packed = Uint8Array.from(atob(letters), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // Numbers are stored with all first bytes first.
  function unshuffle(raw, size) {
    if (size === 1) return raw;
    const n = raw.length / size, whole = new Uint8Array(raw.length);
    for (let b = 0; b < size; b++)
      for (let i = 0, o = b * n; i < n; i++) whole[i * size + b] = raw[o + i];
    const Kind = { 2: Uint16Array, 4: Uint32Array, 8: Float64Array }[size];
    return new Kind(whole.buffer);
  }

  function unpack(raw, bits) {
    if (bits > 1) return unshuffle(raw, bits / 8);
    const cells = new Uint8Array(raw.length * 8);
    for (let i = 0; i < cells.length; i++) cells[i] = (raw[i >> 3] >> (7 - (i & 7))) & 1;
    return cells;
  }

  if (typeof DecompressionStream === "undefined") {
    $("notes").hidden = false;
    $("notes").textContent = "This browser is too old: it has no DecompressionStream.";
    return;
  }
  const clock = unshuffle(await inflate($("times").textContent), 8);
  const curve = {}, curves = unshuffle(await inflate($("curves").textContent), 8);
  meta.curves.forEach((name, i) => { curve[name] = curves.subarray(i * T, (i + 1) * T); });
  const starts = clock.subarray(0, T), ends = clock.subarray(T, 2 * T), walls = clock.subarray(2 * T);
  for (const step of [...meta.steps, ...Object.values(meta.layers).flat()]) {
    const index = unshuffle(await inflate($("i" + step.id).textContent), 8);
    const n = index.length / 2;
    step.places = new Map();
    for (let i = 0, at = 0; i < n; at += index[n + i], i++) step.places.set(index[i], [at, index[n + i]]);
    step.text = $(step.id).firstChild ? $(step.id).firstChild.data : "";
    step.rowTiles = Math.ceil(step.columns / meta.tileColumns);
  }
  const seen = new Float64Array(T); // pages that were looked at, by window
  meta.sizes.forEach(([first, pages], i) => seen.fill(pages, first, (meta.sizes[i + 1] || [T])[0]));

  const known = new Float64Array(T + 1); // windows before this one of which residency is known
  {
    const flags = new Uint8Array(T);
    meta.known.forEach(([first, flag], i) => flags.fill(flag, first, (meta.known[i + 1] || [T])[0]));
    for (let w = 0; w < T; w++) known[w + 1] = known[w] + flags[w];
    for (const name of ["resident", "evicted"])
      if (curve[name]) curve[name] = curve[name].map((n, w) => (flags[w] ? n : NaN));
  }
  const hasStates = "resident" in meta.layers && "evicted" in meta.layers;
  const events = Object.keys(EVENTS).filter((name) => name in meta.layers);
  const shownLayers = new Set(["states", ...events]);

  const cache = new Map();
  function tile(step, number) {
    const key = step.id + ":" + number;
    let found = cache.get(key);
    if (found === undefined) {
      const place = step.places.get(number);
      found = { cells: null, ready: null };
      if (place)
        found.ready = inflate(step.text.substr(place[0], place[1])).then((raw) => {
          found.cells = unpack(raw, step.bits);
        });
    } else cache.delete(key);
    cache.set(key, found);
    if (cache.size > CACHED_TILES) cache.delete(cache.keys().next().value);
    return found;
  }

  // -- what is in view -------------------------------------------------------

  // Pages and windows counted from the first ones; fractions are fine.
  const view = { g0: 0, g1: N, w0: 0, w1: T };
  let width = 0, height = 0, cursor = null, crosshair = false, drawing = 0, shownAt = null, marks = [];
  const sharp = document.createElement("canvas");

  const xOf = (w) => MARGIN.left + ((w - view.w0) / (view.w1 - view.w0)) * width;
  const yOf = (g) => MARGIN.top + (1 - (g - view.g0) / (view.g1 - view.g0)) * height;
  const windowAt = (x) => view.w0 + ((x - MARGIN.left) / width) * (view.w1 - view.w0);
  const pageAt = (y) => view.g0 + (1 - (y - MARGIN.top) / height) * (view.g1 - view.g0);
  const partOf = (page) => meta.parts.findLast(([at]) => at <= page) || meta.parts[0];
  const gfnOf = (page) => { const [at, gfn] = partOf(page); return gfn + page - at; };
  // The place of a gfn, or of the next one that is shown.
  const pageOf = (gfn) =>
    meta.parts.reduce((sum, [, first, n]) => sum + Math.min(Math.max(gfn - first, 0), n), 0);
  const hexGfn = (gfn) => "0x" + BigInt(Math.floor(gfn)).toString(16);
  const hex = (page) => hexGfn(gfnOf(Math.floor(page)));
  const hexEnd = (page) => hexGfn(gfnOf(Math.ceil(page) - 1) + 1);

  function clamp(low, high, least, most) {
    let size = Math.min(Math.max(high - low, Math.min(least, most)), most);
    const middle = (low + high) / 2;
    low = Math.min(Math.max(middle - size / 2, 0), most - size);
    return [low, low + size];
  }

  function show(g0, g1, w0, w1) {
    [view.g0, view.g1] = clamp(g0, g1, 8, N);
    [view.w0, view.w1] = clamp(w0, w1, 4, T);
    const gfns = hex(view.g0) + ":" + hexEnd(view.g1);
    const first = meta.firstWindow + Math.floor(view.w0), end = meta.firstWindow + Math.ceil(view.w1);
    if (document.activeElement !== $("gfns")) $("gfns").value = gfns;
    if (document.activeElement !== $("windows")) $("windows").value = first + ":" + end;
    draw();
  }

  function zoom(factorG, factorW, x, y) {
    const g = pageAt(y), w = windowAt(x);
    show(g - (g - view.g0) * factorG, g + (view.g1 - g) * factorG,
         w - (w - view.w0) * factorW, w + (view.w1 - w) * factorW);
  }
  const zoomMiddle = (fg, fw) => {
    const at = crosshair && cursor ? cursor : { x: MARGIN.left + width / 2, y: MARGIN.top + height / 2 };
    zoom(fg, fw, at.x, at.y);
  };
  const move = (dx, dy) => {
    const g = (dy / height) * (view.g1 - view.g0), w = (dx / width) * (view.w1 - view.w0);
    show(view.g0 + g, view.g1 + g, view.w0 + w, view.w1 + w);
  };
  const reset = () => show(0, N, 0, T);

  // The coarsest cells that are no larger than a pixel, or the finest there are.
  function pickStep(every = meta.steps, rows = height, columns = width) {
    const pages = Math.log2((view.g1 - view.g0) / rows), windows = Math.log2((view.w1 - view.w0) / columns);
    const levels = every.map((s) => s.level);
    const fit = levels.filter((l) => l <= pages);
    const level = fit.length ? Math.max(...fit) : Math.min(...levels);
    const steps = every.filter((s) => s.level === level);
    return steps.filter((s) => s.step <= windows).pop() || steps[0];
  }

  // -- drawing ---------------------------------------------------------------

  function colours() {
    const dark = root.dataset.theme === "dark", table = new Uint32Array(256), name = $("palette").value;
    const anchors = ((dark && LUTS[name + "-dark"]) || LUTS[name]).match(/../g).map((t) => parseInt(t, 16));
    for (let i = 0; i < 256; i++) {
      // Dense is what stands out: dark on white, bright on black.
      const at = ((dark ? i : 255 - i) / 255) * 31, a = Math.floor(at), b = Math.min(a + 1, 31), f = at - a;
      const c = (k) => Math.round(anchors[3 * a + k] * (1 - f) + anchors[3 * b + k] * f);
      table[i] = (255 << 24) | (c(2) << 16) | (c(1) << 8) | c(0);
    }
    return table;
  }
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  function pixel(name) {
    const v = parseInt(css(name).slice(1), 16);
    return ((255 << 24) | ((v & 255) << 16) | (v & 0xff00) | (v >> 16)) >>> 0;
  }
  const shade = (d) => Math.min(255, Math.max(0, Math.round(255 * Math.pow((d - LEAST) / (1 - LEAST), GAMMA))) || 0);

  // For each pixel the bins under it; neighbours with the same bins form a group.
  function groups(pixels, valueAt, size, n) {
    const of = new Int32Array(pixels), lows = [], highs = [];
    for (let p = 0; p < pixels; p++) {
      const low = Math.min(Math.floor(valueAt(p) / size), n - 1);
      const high = Math.min(Math.max(low + 1, Math.floor(valueAt(p + 1) / size)), n);
      const last = lows.length - 1;
      if (last < 0 || lows[last] !== low || highs[last] !== high) { lows.push(low); highs.push(high); }
      of[p] = lows.length - 1;
    }
    return { of, lows, highs, n: lows.length };
  }

  async function draw() {
    const turn = ++drawing;
    map.dataset.ready = "";
    frame();
    await new Promise(requestAnimationFrame);
    if (turn !== drawing || width < 1 || height < 1) return;
    const step = pickStep(), now = { ...view };
    const cells = await cellsOf(step, height, width, now);
    const states = hasStates && shownLayers.has("states")
      ? await Promise.all(["resident", "evicted"].map((name) => cellsOf(pickStep(meta.layers[name]), height, width, now)))
      : null;
    const found = await marksOf(now);
    if (turn !== drawing) return;
    marks = found;
    paint(cells, states);
    shownAt = now;
    frame();
    $("resolution").textContent =
      "cells of " + count(2 ** step.level, "page") + " × " + count(2 ** step.step, "window");
    map.dataset.level = step.level;
    map.dataset.step = step.step;
    map.dataset.ready = "1";
  }

  // The sums of a step's cells under each of some rows and columns of the picture.
  async function cellsOf(step, nRows, nColumns, now) {
    const rows = groups(nRows, (p) => now.g0 + (p / nRows) * (now.g1 - now.g0), 2 ** step.level, step.bins);
    const columns = groups(nColumns, (p) => now.w0 + (p / nColumns) * (now.w1 - now.w0), 2 ** step.step, step.columns);
    const tiles = [];
    const lastRow = rows.highs[rows.n - 1] - 1, lastColumn = columns.highs[columns.n - 1] - 1;
    for (let r = Math.floor(rows.lows[0] / meta.tileBins); r <= Math.floor(lastRow / meta.tileBins); r++)
      for (let c = Math.floor(columns.lows[0] / meta.tileColumns); c <= Math.floor(lastColumn / meta.tileColumns); c++)
        tiles.push([r, c, tile(step, r * step.rowTiles + c)]);
    await Promise.all(tiles.map((t) => t[2].ready));
    return { step, rows, columns, totals: add(tiles, rows, columns) };
  }

  // Where pages were evicted and refaulted: [page, window, event, how many], a mark a cell.
  async function marksOf(now) {
    const nRows = Math.max(1, Math.floor(height / MARK)), nColumns = Math.max(1, Math.floor(width / MARK));
    const found = new Map();
    for (const name of events.filter((each) => shownLayers.has(each))) {
      const step = pickStep(meta.layers[name], nRows, nColumns);
      const { rows, columns, totals } = await cellsOf(step, nRows, nColumns, now);
      for (let i = 0; i < rows.n; i++)
        for (let j = 0; j < columns.n; j++) {
          const n = totals[i * columns.n + j];
          if (!n) continue;
          const page = Math.min((rows.lows[i] + rows.highs[i]) / 2 * 2 ** step.level, N);
          const at = Math.min((columns.lows[j] + columns.highs[j]) / 2 * 2 ** step.step, T);
          const key = [i, j, name === "refaulted"].join();
          const before = found.get(key);
          // Of several causes in one cell the most frequent one is drawn.
          if (!before || before[3] < n) found.set(key, [page, at, name, n]);
        }
    }
    return [...found.values()];
  }
  const count = (n, what) => n.toLocaleString("en") + " " + what + (n === 1 ? "" : "s");

  function add(tiles, rows, columns) {
    const totals = new Float64Array(rows.n * columns.n);
    for (const [r, c, { cells }] of tiles) {
      if (!cells) continue;
      const b0 = r * meta.tileBins, c0 = c * meta.tileColumns;
      let i = 0;
      while (i < rows.n && rows.highs[i] <= b0) i++;
      for (; i < rows.n && rows.lows[i] < b0 + meta.tileBins; i++)
        for (let b = Math.max(rows.lows[i], b0); b < Math.min(rows.highs[i], b0 + meta.tileBins); b++) {
          const line = (b - b0) * meta.tileColumns - c0;
          let j = 0;
          while (j < columns.n && columns.highs[j] <= c0) j++;
          for (; j < columns.n && columns.lows[j] < c0 + meta.tileColumns; j++) {
            const until = Math.min(columns.highs[j], c0 + meta.tileColumns);
            let sum = 0;
            for (let w = Math.max(columns.lows[j], c0); w < until; w++) sum += cells[line + w];
            totals[i * columns.n + j] += sum;
          }
        }
    }
    return totals;
  }

  // How many pages of [low, high) were looked at, over windows [first, end).
  function looked(low, high, first, end, least, most) {
    if (high <= least) return (high - low) * (end - first);
    if (low >= most) return 0;
    let sum = 0;
    for (let w = first; w < end; w++) sum += Math.max(0, Math.min(high, seen[w]) - low);
    return sum;
  }

  // What most pages are at each pixel: 0 never touched, 1 resident, 2 evicted; 3 unknown.
  function statesAt(states) {
    const out = new Uint8Array(width * height);
    const [resident, evicted] = states.map(({ step, rows, columns, totals }) => ({ step, rows, columns, totals }));
    const share = (layer, row, column, whole) =>
      layer.totals[layer.rows.of[row] * layer.columns.n + layer.columns.of[column]] / whole(layer, row, column);
    const whole = (layer, row, column) => {
      const r = layer.rows.of[row], c = layer.columns.of[column];
      const pages = Math.min(layer.rows.highs[r] * 2 ** layer.step.level, N) - layer.rows.lows[r] * 2 ** layer.step.level;
      const windows = known[Math.min(layer.columns.highs[c] * 2 ** layer.step.step, T)] - known[layer.columns.lows[c] * 2 ** layer.step.step];
      return pages * windows;
    };
    for (let p = 0; p < height; p++)
      for (let x = 0; x < width; x++) {
        const at = p * width + x;
        // Neighbours with the same cells under them have the same state.
        if (x && resident.columns.of[x] === resident.columns.of[x - 1] && evicted.columns.of[x] === evicted.columns.of[x - 1]) {
          out[at] = out[at - 1];
          continue;
        }
        const r = share(resident, p, x, whole), e = share(evicted, p, x, whole), never = 1 - r - e;
        out[at] = Number.isNaN(r) || Number.isNaN(e) ? 3 : never >= r && never >= e ? 0 : r >= e ? 1 : 2;
      }
    return out;
  }

  function paint({ step, rows, columns, totals }, states) {
    const backs = [pixel("--plot"), pixel("--resident"), pixel("--evicted"), pixel("--plot")];
    const under = states && statesAt(states);
    sharp.width = width;
    sharp.height = height;
    const context = sharp.getContext("2d"), image = context.createImageData(width, height);
    const out = new Uint32Array(image.data.buffer), table = colours();
    const none = pixel("--plot"), unseen = pixel("--unseen");
    const pages = 2 ** step.level, windows = 2 ** step.step;
    const line = new Uint32Array(columns.n), spans = [];
    for (let j = 0; j < columns.n; j++) {
      const first = columns.lows[j] * windows, end = Math.min(columns.highs[j] * windows, T);
      let least = Infinity, most = 0;
      for (let w = first; w < end; w++) { least = Math.min(least, seen[w]); most = Math.max(most, seen[w]); }
      spans.push([first, end, least, most]);
    }
    let group = -1;
    for (let p = 0; p < height; p++) {
      if (rows.of[p] !== group) {
        group = rows.of[p];
        const low = rows.lows[group] * pages, high = Math.min(rows.highs[group] * pages, N);
        for (let j = 0; j < columns.n; j++) {
          const total = totals[group * columns.n + j], whole = looked(low, high, ...spans[j]);
          line[j] = whole === 0 ? unseen : total === 0 ? none : table[shade(total / whole)];
        }
      }
      const at = (height - 1 - p) * width;
      for (let x = 0; x < width; x++) {
        const colour = line[columns.of[x]];
        out[at + x] = under && colour === none ? backs[under[p * width + x]] : colour;
      }
    }
    context.putImageData(image, 0, 0);
  }

  function nice(span, most, powers) {
    for (let p = 0; ; p++) {
      const sizes = powers(p);
      for (const size of sizes) if (span / size <= most) return size;
    }
  }

  function duration(s) {
    if (s === 0 || Math.abs(s) < 60) return +s.toFixed(3) + " s";
    const h = Math.floor(s / 3600), m = Math.floor((s % 3600) / 60), r = (s % 60).toFixed(s < 600 ? 1 : 0);
    return (h ? h + ":" + String(m).padStart(2, "0") : m) + ":" + (r < 10 ? "0" : "") + r.replace(/\.0$/, "");
  }

  // The picture, shifted and scaled until a sharp one is there, and what stands around it.
  function frame() {
    const context = map.getContext("2d"), ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const w = width + MARGIN.left + MARGIN.right, h = height + MARGIN.top + MARGIN.bottom;
    context.clearRect(0, 0, w, h);
    context.fillStyle = css("--unseen");
    context.fillRect(MARGIN.left, MARGIN.top, width, height);
    context.save();
    context.beginPath();
    context.rect(MARGIN.left, MARGIN.top, width, height);
    context.clip();
    if (shownAt && sharp.width) {
      context.imageSmoothingEnabled = false;
      const x = xOf(shownAt.w0), y = yOf(shownAt.g1);
      context.drawImage(sharp, x, y, xOf(shownAt.w1) - x, yOf(shownAt.g0) - y);
    }
    drawSlots(context);
    drawMarks(context);
    drawCuts(context);
    drawEvents(context);
    context.restore();
    drawAxes(context);
    if (cursor && (crosshair || cursor.box)) drawCursor(context);
    drawCurves();
  }

  // Lines where memory was left out.
  function drawCuts(context) {
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "center";
    meta.parts.forEach(([at, gfn], i) => {
      if (!i) return;
      const [, before, n] = meta.parts[i - 1], y = Math.round(yOf(at));
      context.fillStyle = css("--back");
      context.fillRect(MARGIN.left, y - 2, width, 5);
      const text = size((gfn - before - n) * meta.pageBytes) + " without a young page left out";
      const wide = context.measureText(text).width + 12;
      context.fillRect(MARGIN.left + (width - wide) / 2, y - 8, wide, 16);
      context.fillStyle = css("--soft");
      context.fillText(text, MARGIN.left + width / 2, y + 4);
    });
    context.textAlign = "left";
  }

  function drawEvents(context) {
    if (!marks.length) return;
    const most = marks.reduce((n, mark) => Math.max(n, mark[3]), 0);
    context.lineWidth = 0.8;
    context.strokeStyle = css("--back");
    for (const [page, at, name, n] of marks) {
      const up = name === "refaulted" ? -1 : 1, r = 1.8 + 3.4 * Math.sqrt(n / most);
      const x = xOf(at) - up * MARK / 5, y = yOf(page);
      context.fillStyle = css("--" + name);
      context.beginPath();
      context.moveTo(x - r, y - up * r * 0.8);
      context.lineTo(x + r, y - up * r * 0.8);
      context.lineTo(x, y + up * r);
      context.closePath();
      context.fill();
      context.stroke();
    }
    context.lineWidth = 1;
  }

  // One value per pixel: the mean of the windows under it; NaN where none is known.
  function meansOf(values) {
    const { of, lows, highs, n } = groups(width, (p) => view.w0 + (p / width) * (view.w1 - view.w0), 1, T);
    const means = new Float64Array(n);
    for (let i = 0; i < n; i++) {
      let k = 0;
      for (let w = lows[i]; w < highs[i]; w++) if (!Number.isNaN(values[w])) { means[i] += values[w]; k++; }
      means[i] /= k;
    }
    return (x) => means[of[x]];
  }

  // A canvas beside the map with its margins; returns its context and a function for the height.
  function panel(name, most, unit, title) {
    const canvas = $(name), ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
    canvas.width = Math.round(box.width * ratio);
    canvas.height = Math.round(box.height * ratio);
    const context = canvas.getContext("2d"), top = 8, bottom = box.height - 5;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.strokeStyle = css("--line");
    context.strokeRect(MARGIN.left - 0.5, top - 0.5, width + 1, bottom - top + 1);
    context.fillStyle = css("--text");
    context.font = "11px ui-monospace, 'DejaVu Sans Mono', monospace";
    context.textAlign = "right";
    context.fillText(unit(most), MARGIN.left - 8, top + 8);
    context.fillText("0", MARGIN.left - 8, bottom);
    context.fillStyle = css("--soft");
    context.font = "11px system-ui, sans-serif";
    context.fillText(title, MARGIN.left - 8, (top + bottom) / 2 + 5);
    context.textAlign = "left";
    return [context, (value) => bottom - (most ? value / most : 0) * (bottom - top - 3), bottom];
  }

  function stroke(context, value, y, colour, dash) {
    context.strokeStyle = css(colour);
    context.setLineDash(dash);
    context.lineWidth = 1.3;
    context.beginPath();
    for (let x = 0, drawn = false; x < width; x++) {
      const at = value(x);
      if (Number.isNaN(at)) { drawn = false; continue; }
      if (drawn) context.lineTo(MARGIN.left + x + 0.5, y(at)); else context.moveTo(MARGIN.left + x + 0.5, y(at));
      drawn = true;
    }
    context.stroke();
    context.setLineDash([]);
    context.lineWidth = 1;
  }

  function gapsIn(context, top, bottom) {
    context.fillStyle = css("--gap");
    for (const w of meta.gaps) {
      const x = xOf(w);
      if (x >= MARGIN.left && x <= MARGIN.left + width) context.fillRect(Math.round(x) - 1, top, 3, bottom - top);
    }
  }

  function drawCurves() {
    if (width < 1) return;
    const pages = (n) => size(n * meta.pageBytes);
    const most = ["young", "resident"].reduce((n, name) => (curve[name] || []).reduce((a, b) => Math.max(a, b || 0), n), 0);
    const [context, y, bottom] = panel("curve", most, pages, "working set");
    const young = meansOf(curve.young);
    context.fillStyle = css("--young");
    context.beginPath();
    context.moveTo(MARGIN.left, bottom);
    for (let x = 0; x < width; x++) {
      context.lineTo(MARGIN.left + x, y(young(x)));
      context.lineTo(MARGIN.left + x + 1, y(young(x)));
    }
    context.lineTo(MARGIN.left + width, bottom);
    context.fill();
    let at = MARGIN.left + width - 8;
    const legend = (text, colour) => {
      at -= context.measureText(text).width;
      label(context, text, at, 20, css(colour));
      at -= 14;
    };
    if (curve.resident) {
      stroke(context, meansOf(curve.resident), y, "--soft", []);
      legend("resident", "--soft");
    }
    legend("young", "--young");
    gapsIn(context, 8, bottom);
    const shown = events.filter((name) => shownLayers.has(name));
    $("events").hidden = !events.length;
    if (!events.length) return;
    const perSecond = Object.fromEntries(events.map((name) =>
      [name, curve[name].map((n, w) => n / Math.max(ends[w] - starts[w], 1e-9))]));
    const top = shown.reduce((n, name) => perSecond[name].reduce((a, b) => Math.max(a, b), n), 0);
    const [below, z, floor] = panel("events", top, (n) => +n.toPrecision(3) + "/s", "pages");
    for (const name of shown) stroke(below, meansOf(perSecond[name]), z, "--" + name, EVENTS[name][2]);
    gapsIn(below, 8, floor);
  }

  function layoutAt(w) {
    let found = meta.layouts[0][1];
    for (const [first, slots] of meta.layouts) if (first <= w) found = slots;
    return found;
  }

  function drawSlots(context) {
    context.strokeStyle = context.fillStyle = css("--slot");
    context.font = "11px system-ui, sans-serif";
    meta.layouts.forEach(([first, slots], i) => {
      const x0 = Math.max(xOf(first), MARGIN.left);
      const x1 = Math.min(xOf(i + 1 < meta.layouts.length ? meta.layouts[i + 1][0] : T), MARGIN.left + width);
      if (x1 <= x0) return;
      for (const [slot, gfn, n] of slots) {
        const low = yOf(pageOf(gfn)), high = yOf(pageOf(gfn + n));
        for (const y of [low, high])
          if (y > MARGIN.top + 1 && y < MARGIN.top + height - 1) {
            context.beginPath();
            context.moveTo(x0, Math.round(y) + 0.5);
            context.lineTo(x1, Math.round(y) + 0.5);
            context.stroke();
          }
        const top = Math.max(high, MARGIN.top), bottom = Math.min(low, MARGIN.top + height);
        if (bottom - top > 18) label(context, "slot " + slot, x0 + 4, top + 13);
      }
    });
  }

  function label(context, text, x, y, colour = context.fillStyle) {
    context.fillStyle = css("--tip");
    context.fillRect(x - 2, y - 10, context.measureText(text).width + 4, 13);
    context.fillStyle = colour;
    context.fillText(text, x, y);
  }

  function drawMarks(context) {
    context.strokeStyle = context.fillStyle = css("--mark");
    context.setLineDash([4, 3]);
    for (const [w] of meta.marks) {
      const x = Math.round(xOf(w)) + 0.5;
      if (x < MARGIN.left || x > MARGIN.left + width) continue;
      context.beginPath();
      context.moveTo(x, MARGIN.top);
      context.lineTo(x, MARGIN.top + height);
      context.stroke();
    }
    context.setLineDash([]);
    gapsIn(context, MARGIN.top, MARGIN.top + height);
  }

  function drawAxes(context) {
    context.strokeStyle = css("--line");
    context.strokeRect(MARGIN.left - 0.5, MARGIN.top - 0.5, width + 1, height + 1);
    context.font = "11px ui-monospace, 'DejaVu Sans Mono', monospace";
    context.fillStyle = css("--text");
    context.textAlign = "right";
    const ticks = roundGfns();
    for (const [gfn, y] of ticks) {
      context.fillRect(MARGIN.left - 5, Math.round(y), 4, 1);
      context.fillText("0x" + gfn.toString(16), MARGIN.left - 8, y + 4);
    }
    context.textAlign = "left";
    context.fillStyle = css("--soft");
    ticks.forEach(([gfn, y], i) => {
      if (i % 2 === 0) context.fillText(size(gfn * meta.pageBytes), MARGIN.left + width + 6, y + 4);
    });
    context.textAlign = "center";
    const steps = nice(view.w1 - view.w0, Math.max(width / 92, 2), (p) => [1, 2, 5].map((b) => b * 10 ** p));
    for (let w = Math.ceil(view.w0 / steps) * steps; w <= view.w1; w += steps) {
      const x = xOf(w), time = w < T ? starts[w] : ends[T - 1];
      context.fillRect(Math.round(x), MARGIN.top + height + 1, 1, 4);
      context.fillStyle = css("--text");
      context.fillText(duration(time), x, MARGIN.top + height + 17);
      context.fillStyle = css("--soft");
      context.fillText("#" + (meta.firstWindow + w), x, MARGIN.top + height + 31);
    }
    context.textAlign = "left";
    context.font = "11px system-ui, sans-serif";
    context.fillText("gfn", 4, 13);
    context.fillText("gpa", MARGIN.left + width + 6, 13);
    let free = 0;
    for (const [w, text] of meta.marks) {
      const x = xOf(w);
      if (x < MARGIN.left || x > MARGIN.left + width || x < free) continue;
      const shown = text.length > 48 ? text.slice(0, 45) + "..." : text;
      const long = context.measureText(shown).width;
      const at = Math.min(x + 2, MARGIN.left + width - long);
      if (at < free) continue;
      context.fillText(shown, at, MARGIN.top - 6);
      free = at + long + 10;
    }
  }

  // Round gfns in view and where they are, and the first gfn of each part.
  function roundGfns() {
    const step = nice(view.g1 - view.g0, Math.max(height / 44, 2), (p) => [2 ** p]), found = [];
    meta.parts.forEach(([at, first, n], i) => {
      const low = Math.max(first, first + view.g0 - at), last = i === meta.parts.length - 1;
      const high = Math.min(first + n - (last ? 0 : 1), first + view.g1 - at);
      const gfns = i && at >= view.g0 && at < view.g1 ? [first] : [];
      for (let gfn = Math.ceil(low / step) * step; gfn <= high; gfn += step) if (gfn !== gfns[0]) gfns.push(gfn);
      for (const gfn of gfns) {
        const y = yOf(at + gfn - first), before = found[found.length - 1];
        if (!before || before[1] - y > 15) found.push([gfn, y]);
      }
    });
    return found;
  }

  function size(bytes) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let i = 0;
    while (i < 5 && bytes >= 1024) { bytes /= 1024; i++; }
    return +bytes.toPrecision(4) + " " + units[i];
  }

  function drawCursor(context) {
    context.strokeStyle = css("--cross");
    if (cursor.box) {
      context.setLineDash([5, 3]);
      context.strokeRect(cursor.box.x, cursor.box.y, cursor.x - cursor.box.x, cursor.y - cursor.box.y);
      context.setLineDash([]);
      return;
    }
    context.beginPath();
    context.moveTo(cursor.x + 0.5, MARGIN.top);
    context.lineTo(cursor.x + 0.5, MARGIN.top + height);
    context.moveTo(MARGIN.left, cursor.y + 0.5);
    context.lineTo(MARGIN.left + width, cursor.y + 0.5);
    context.stroke();
  }

  // -- what a cell says ------------------------------------------------------

  const inside = (x, y) =>
    x >= MARGIN.left && x < MARGIN.left + width && y >= MARGIN.top && y < MARGIN.top + height;

  async function tell() {
    if (!cursor || cursor.box || !inside(cursor.x, cursor.y)) { tip.hidden = true; return; }
    const at = cursor, step = pickStep();
    const bin = Math.min(Math.floor(pageAt(at.y) / 2 ** step.level), step.bins - 1);
    const column = Math.min(Math.floor(windowAt(at.x) / 2 ** step.step), step.columns - 1);
    if (bin < 0 || column < 0) return;
    const found = tile(step, Math.floor(bin / meta.tileBins) * step.rowTiles + Math.floor(column / meta.tileColumns));
    await found.ready;
    if (cursor !== at) return;
    const young = cellIn(found, bin, column), around = {};
    for (const [name, steps] of Object.entries(meta.layers)) {
      // The same cell, or the smallest that contains it.
      const fit = steps.filter((s) => s.level >= step.level && s.step >= step.step);
      if (!fit.length) continue;
      const own = fit.reduce((a, b) => (b.level - a.level || b.step - a.step) < 0 ? b : a);
      const b = Math.floor(bin / 2 ** (own.level - step.level)), c = Math.floor(column / 2 ** (own.step - step.step));
      const held = tile(own, Math.floor(b / meta.tileBins) * own.rowTiles + Math.floor(c / meta.tileColumns));
      await held.ready;
      around[name] = [own, b, c, cellIn(held, b, c)];
    }
    if (cursor !== at) return;
    tip.textContent = describe(step, bin, column, young, around);
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), room = map.getBoundingClientRect();
    const left = at.x + 16 + box.width > room.width ? at.x - box.width - 12 : at.x + 16;
    const top = at.y + 14 + box.height > room.height ? at.y - box.height - 10 : at.y + 14;
    tip.style.left = Math.max(0, left) + "px";
    tip.style.top = Math.max(0, top) + "px";
  }

  const cellIn = (found, bin, column) => found.cells
    ? found.cells[(bin % meta.tileBins) * meta.tileColumns + (column % meta.tileColumns)] : 0;

  // Where the pages of a cell were, and what happened to them in its windows.
  function told(step, around) {
    const lines = [], of = (own, b) => {
      if (own.level === step.level && own.step === step.step) return "";
      const low = b * 2 ** own.level, high = Math.min(low + 2 ** own.level, N);
      return "  (in " + hex(low) + ":" + hexEnd(high) + ")";
    };
    const pages = (n) => (+n.toFixed(1)).toLocaleString("en");
    if (around.resident && around.evicted) {
      const [own, b, c, resident] = around.resident, evicted = around.evicted[3];
      const first = c * 2 ** own.step, windows = known[Math.min(first + 2 ** own.step, T)] - known[first];
      const whole = Math.min((b + 1) * 2 ** own.level, N) - b * 2 ** own.level;
      if (!windows) lines.push("state    unknown");
      else if (whole === 1 && windows === 1)
        lines.push("state    " + (resident ? "resident" : evicted ? "evicted" : "never touched"));
      else lines.push("state    " + pages(resident / windows) + " resident, " + pages(evicted / windows) + " evicted, " +
        pages(whole - (resident + evicted) / windows) + " never touched" + of(own, b));
    }
    for (const name of events) {
      const [own, b, , n] = around[name] || [null, 0, 0, 0];
      if (n) lines.push(EVENTS[name][0] + " " + pages(n) + " " + EVENTS[name][1] + of(own, b));
    }
    return lines;
  }

  function describe(step, bin, column, young, around) {
    const low = bin * 2 ** step.level, high = Math.min(low + 2 ** step.level, N);
    const first = column * 2 ** step.step, end = Math.min(first + 2 ** step.step, T);
    const gpa = (gfn) => "0x" + (BigInt(gfn) * BigInt(meta.pageBytes)).toString(16);
    const gfn0 = gfnOf(low), gfn1 = gfnOf(high - 1) + 1;
    const one = high - low === 1, whole = looked(low, high, first, end, -1, Infinity);
    const slot = layoutAt(first).find(([, gfn, n]) => gfn <= gfn0 && gfn0 < gfn + n);
    let session = meta.sessions[0];
    for (const each of meta.sessions) if (each[0] <= first) session = each;
    const lines = [
      "gfn      " + (one ? hex(low) : hex(low) + ":" + hexEnd(high) + "  " + count(high - low, "page")),
      "gpa      " + gpa(gfn0) + (one ? "" : ":" + gpa(gfn1)),
      "memslot  " + (slot
        ? slot[0] + ", offset 0x" + ((gfn0 - slot[1]) * meta.pageBytes).toString(16) + hva(slot, gfn0)
        : "none"),
      "window   #" + (meta.firstWindow + first) + (end - first > 1 ? " to #" + (meta.firstWindow + end - 1) : ""),
      "time     " + duration(starts[first]) + " to " + duration(ends[end - 1]),
    ];
    if (walls[end - 1] > 0)
      lines.push("ended    " + new Date(walls[end - 1] * 1000).toISOString().replace("T", " ").replace(/\.\d+Z/, " UTC"));
    if (whole === 0) lines.push("not looked at");
    else if (one && end - first === 1) lines.push(young ? "young" : "not young");
    else lines.push("young    " + young.toLocaleString("en") + " of " + whole.toLocaleString("en") +
      " (" + (100 * young / whole).toFixed(2) + " %)");
    lines.push(...told(step, around));
    lines.push("tracker  " + session[1] + " (" + session[2] + ")");
    return lines.join("\n");
  }

  function hva(slot, gfn) {
    if (!slot[3]) return "";
    return ", hva 0x" + (BigInt(slot[3]) + BigInt(gfn - slot[1]) * BigInt(meta.pageBytes)).toString(16);
  }

  // -- hands -----------------------------------------------------------------

  const place = (event) => {
    const box = map.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  };
  const fingers = new Map();

  map.addEventListener("wheel", (event) => {
    event.preventDefault();
    const at = place(event), delta = event.deltaY || event.deltaX;
    const factor = Math.exp(Math.max(-1, Math.min(1, delta * (event.deltaMode ? 0.05 : 0.002))));
    zoom(event.altKey ? 1 : factor, event.shiftKey ? 1 : factor, at.x, at.y);
    tell();
  }, { passive: false });

  map.addEventListener("pointerdown", (event) => {
    const at = place(event);
    try { map.setPointerCapture(event.pointerId); } catch { /* not a real pointer */ }
    fingers.set(event.pointerId, at);
    cursor = event.shiftKey ? { ...at, box: at } : at;
    if (!event.shiftKey) map.classList.add("moving");
  });
  map.addEventListener("pointermove", (event) => {
    const at = place(event), before = fingers.get(event.pointerId);
    if (before && fingers.size === 2) pinch(event.pointerId, at);
    else if (before && cursor && cursor.box) { cursor = { ...at, box: cursor.box }; frame(); }
    else {
      if (before) move(before.x - at.x, at.y - before.y);
      cursor = at;
      if (crosshair) frame();
    }
    if (before) fingers.set(event.pointerId, at);
    tell();
  });
  function pinch(id, at) {
    const other = [...fingers].find(([key]) => key !== id)[1], before = fingers.get(id);
    const apart = (a, b, axis) => Math.max(Math.abs(a[axis] - b[axis]), 20);
    zoom(apart(before, other, "y") / apart(at, other, "y"), apart(before, other, "x") / apart(at, other, "x"),
         (at.x + other.x) / 2, (at.y + other.y) / 2);
  }
  const lift = (event) => {
    fingers.delete(event.pointerId);
    map.classList.remove("moving");
    if (cursor && cursor.box) {
      const { box, x, y } = cursor;
      cursor = { x, y };
      if (Math.abs(x - box.x) > 3 && Math.abs(y - box.y) > 3)
        show(pageAt(Math.max(y, box.y)), pageAt(Math.min(y, box.y)),
             windowAt(Math.min(x, box.x)), windowAt(Math.max(x, box.x)));
      else frame();
    }
  };
  map.addEventListener("pointerup", lift);
  map.addEventListener("pointercancel", lift);
  map.addEventListener("pointerleave", () => {
    if (!crosshair && !fingers.size) { cursor = null; tip.hidden = true; }
  });
  map.addEventListener("dblclick", reset);

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  const KEYS = {
    "+": () => zoomMiddle(0.5, 0.5), "=": () => zoomMiddle(0.5, 0.5), "-": () => zoomMiddle(2, 2),
    g: () => zoomMiddle(0.5, 1), G: () => zoomMiddle(2, 1), t: () => zoomMiddle(1, 0.5), T: () => zoomMiddle(1, 2),
    0: reset, Home: reset, c: toggleCrosshair,
    Escape: () => (crosshair ? toggleCrosshair() : reset()),
    "?": () => $("help").click(),
  };
  map.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey) return;
    const arrow = ARROWS[event.key];
    if (arrow && crosshair) moveCrosshair(...arrow, event.shiftKey ? 10 : 1);
    else if (arrow) move((arrow[0] * width) / 10, (arrow[1] * height) / 10);
    else if (KEYS[event.key]) KEYS[event.key]();
    else return;
    event.preventDefault();
    tell();
  });
  function toggleCrosshair() {
    crosshair = !crosshair;
    if (crosshair) cursor = { x: MARGIN.left + Math.floor(width / 2), y: MARGIN.top + Math.floor(height / 2) };
    else { cursor = null; tip.hidden = true; }
    frame();
  }
  // By one cell, or by a pixel where cells are smaller.
  function moveCrosshair(dx, dy, times) {
    const step = pickStep();
    const x = Math.max(1, (2 ** step.step * width) / (view.w1 - view.w0)) * dx * times;
    const y = Math.max(1, (2 ** step.level * height) / (view.g1 - view.g0)) * dy * times;
    cursor = {
      x: Math.min(Math.max(cursor.x + x, MARGIN.left), MARGIN.left + width - 1),
      y: Math.min(Math.max(cursor.y - y, MARGIN.top), MARGIN.top + height - 1),
    };
    frame();
  }

  function parseRange(text, name, low, high) {
    const match = text.trim().match(/^(0x[0-9a-f]+|\d+)?\s*:\s*(0x[0-9a-f]+|\d+)?$/i);
    if (!match) throw new Error(name + ": write a range such as " + (name === "gfns" ? "0x400:0x800" : "0:60"));
    const first = match[1] ? Number(match[1]) : low, end = match[2] ? Number(match[2]) : high;
    if (first < low || end > high || first >= end)
      throw new Error(name + ": there are " + (name === "gfns"
        ? "0x" + low.toString(16) + ":0x" + high.toString(16) : low + ":" + high));
    return [first - low, end - low];
  }
  $("bar").addEventListener("submit", (event) => {
    event.preventDefault();
    try {
      const end = gfnOf(N - 1) + 1;
      const gfns = parseRange($("gfns").value, "gfns", meta.gfnStart, end).map((g) => pageOf(meta.gfnStart + g));
      if (gfns[0] === gfns[1]) throw new Error("gfns: this page leaves them out; --all shows them");
      const windows = parseRange($("windows").value, "windows", meta.firstWindow, meta.firstWindow + T);
      $("complaint").textContent = "";
      map.focus();
      show(...gfns, ...windows);
    } catch (error) {
      $("complaint").textContent = error.message;
    }
  });
  $("in").addEventListener("click", () => zoomMiddle(0.5, 0.5));
  $("out").addEventListener("click", () => zoomMiddle(2, 2));
  $("reset").addEventListener("click", reset);
  $("palette").addEventListener("change", () => { drawLegend(); draw(); });
  $("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  $("help").addEventListener("click", () => {
    $("keys").hidden = !$("keys").hidden;
    $("help").setAttribute("aria-expanded", String(!$("keys").hidden));
  });

  function setTheme(name) {
    root.dataset.theme = name;
    $("theme").textContent = name === "dark" ? "Light" : "Dark";
    drawLegend();
    draw();
  }

  function drawLegend() {
    const canvas = $("legend"), context = canvas.getContext("2d");
    const image = context.createImageData(256, 12), out = new Uint32Array(image.data.buffer), table = colours();
    for (let i = 0; i < out.length; i++) out[i] = i % 256 < 6 ? pixel("--plot") : table[i % 256];
    context.putImageData(image, 0, 0);
    $("scale").textContent = "none, then 0.05 % to 100 % of pages young in a window; half way is 21 %";
    $("states").replaceChildren(...(hasStates && shownLayers.has("states") ? [
      ["never touched", "--plot"], ["resident", "--resident"], ["evicted", "--evicted"],
    ] : []).map(([name, colour]) => {
      const entry = document.createElement("span"), swatch = document.createElement("i");
      swatch.style.background = css(colour);
      entry.append(swatch, name);
      return entry;
    }));
    for (const name of events) $("mark-" + name).style.color = css("--" + name);
  }

  // A box for each layer: where pages are, and each kind of event.
  function offerLayers() {
    const every = [...(hasStates ? [["states", "", "where pages are"]] : []), ...events.map((name) => [name, ...EVENTS[name]])];
    for (const [name, mark, text] of every) {
      const line = document.createElement("label"), box = document.createElement("input"), sign = document.createElement("b");
      box.type = "checkbox";
      box.checked = true;
      box.id = "layer-" + name;
      box.addEventListener("change", () => {
        if (box.checked) shownLayers.add(name); else shownLayers.delete(name);
        drawLegend();
        draw();
      });
      sign.id = "mark-" + name;
      sign.textContent = mark;
      line.append(box, sign, text);
      $("layers").append(line);
    }
    $("layers").hidden = !every.length;
    // Yellow and green on orange are hard to tell apart; blue is not, for any colour vision.
    $("palette").value = every.length ? "blues" : "viridis";
  }

  function introduce() {
    const session = meta.sessions[meta.sessions.length - 1];
    const facts = ["image", "engine", "kernel"].filter((key) => meta.facts[key]).map((key) => key + " " + meta.facts[key]);
    $("about").textContent = [
      size(N * meta.pageBytes) + " from gfn 0x" + meta.gfnStart.toString(16),
      count(T, "window") + " of " + duration(meta.intervalS) + " over " + duration(ends[T - 1]),
      "tracker " + session[1] + ", format " + session[2], ...facts, "record " + meta.file,
    ].join("  ·  ");
    const notes = meta.notes.length ? [meta.notes.join("; ") + "."] : [];
    if (meta.layersLeftOut.length)
      notes.push("Where pages were did not fit; a page of a part of the record (--range, --windows) has it.");
    const finest = Math.min(...meta.steps.map((s) => s.level));
    if (finest > 0)
      notes.push("Cells of fewer than " + count(2 ** finest, "page") + " did not fit into " + size(meta.budgetBytes) +
        " and were left out; a page of a part of the record (--range, --windows) or a larger one (--max-size) has them.");
    $("notes").textContent = notes.join(" ");
    $("notes").hidden = !notes.length;
  }

  function fit() {
    const box = map.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    map.width = Math.round(box.width * ratio);
    map.height = Math.round(box.height * ratio);
    width = Math.max(1, Math.floor(box.width) - MARGIN.left - MARGIN.right);
    height = Math.max(1, Math.floor(box.height) - MARGIN.top - MARGIN.bottom);
    draw();
  }

  introduce();
  offerLayers();
  root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  $("theme").textContent = root.dataset.theme === "dark" ? "Light" : "Dark";
  drawLegend();
  show(0, N, 0, T);
  new ResizeObserver(fit).observe(map);
})();

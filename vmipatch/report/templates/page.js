"use strict";
// The page's data is one JSON document, deflated, in base64: nothing in it is ever taken for markup.
// Addresses are hexadecimal text and BigInt: 64-bit ones are no JavaScript numbers.
(async () => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const root = document.documentElement;

  // Light and dark: as the system says, until the button is used.
  const wanted = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const dress = () => {
    const dark = chosen === null ? wanted.matches : chosen === "dark";
    root.dataset.theme = dark ? "dark" : "light";
    $("theme").textContent = dark ? "Light" : "Dark";
    if (map) map.draw();
  };
  let map = null;
  wanted.addEventListener("change", dress);
  $("theme").addEventListener("click", () => { chosen = root.dataset.theme === "dark" ? "light" : "dark"; dress(); });
  dress();

  const unpack = async () => {
    const raw = Uint8Array.from(atob($("data").textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  };
  let data;
  try { data = await unpack(); } catch (error) { $("away").hidden = false; return; }

  const { kinds, rows, strings, codes, titles } = data;
  const total = rows.at.length;
  const base = BigInt(data.base);
  const number = (n) => n.toLocaleString("en-US");
  const hex = (value) => "0x" + value.toString(16);
  const wide = data.bits / 4;
  // A place's address is a distance from the base, or, where that is no JavaScript number, hexadecimal text.
  const addressOf = (at) => at === null ? null : typeof at === "string" ? BigInt(at) : base + BigInt(at);
  const addressText = (at) => at === null ? "–" : "0x" + addressOf(at).toString(16).padStart(wide, "0");
  const whereText = (r) => {
    const symbol = strings[rows.symbol[r]];
    return symbol ? symbol + (rows.offset[r] ? "+0x" + rows.offset[r].toString(16) : "") : strings[rows.section[r]] || "";
  };
  const on = kinds.map(() => true);
  const changed = (side, r) => { const c = rows.code[r * titles.length + side]; return c < 0 ? null : codes[c]; };

  // ---------------------------------------------------------------- legend
  const legend = $("legend");
  kinds.forEach((kind, k) => {
    const item = make("li");
    const button = make("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    if (kind.help) button.title = kind.help;
    const swatch = make("span", "swatch");
    swatch.style.background = `var(--k${k})`;
    button.append(swatch, make("span", "", kind.name), make("span", "count", kind.count));
    button.addEventListener("click", (event) => {
      // Alt or a double click: this one alone, or all again.
      if (event.altKey || event.detail === 2) {
        const alone = on.every((v, i) => v === (i === k)) ;
        kinds.forEach((_, i) => { on[i] = alone || i === k; });
      } else on[k] = !on[k];
      [...legend.querySelectorAll("button[aria-pressed]")].forEach((b, i) => b.setAttribute("aria-pressed", String(on[i])));
      refilter();
      if (map) map.draw();
    });
    item.append(button);
    legend.append(item);
  });
  if (data.plain) {
    const item = make("li");
    const note = make("button", "plain");
    note.tabIndex = -1;
    note.append(make("span", "swatch"), make("span", "", data.plain.name), make("span", "count", data.plain.count));
    item.append(note);
    legend.prepend(item);
  }

  // ---------------------------------------------------------------- table
  const view = $("view"), pad = $("pad"), count = $("found"), search = $("search");
  const columns = data.columns;
  const rowHeight = () => parseFloat(getComputedStyle(root).getPropertyValue("--row"));
  let order = [...Array(total).keys()], shown = order, selected = -1;
  let sortBy = null, down = false;
  let hay = null;
  const haystack = () => hay ??= order0.map((r) => [addressText(rows.at[r]), whereText(r), kinds[rows.kind[r]].name,
    strings[rows.what[r]], strings[rows.note[r]], changeText(r)].join(" ").toLowerCase());
  const order0 = [...Array(total).keys()];
  const changeText = (r) => {
    const before = changed(0, r), now = changed(1, r);
    const some = (c) => c[0].length > 20 ? c[0].slice(0, 20) + "…" : c[0];
    return before && now ? some(before) + " → " + some(now) : before ? some(before) : "";
  };
  const cell = {
    address: (r) => addressText(rows.at[r]), where: whereText, kind: (r) => kinds[rows.kind[r]].name,
    what: (r) => strings[rows.what[r]], length: (r) => rows.length[r] === null ? "" : rows.length[r], change: changeText,
  };
  const key = {
    ...cell, kind: (r) => rows.kind[r], length: (r) => rows.length[r] ?? -1,
    address: (r) => rows.at[r] === null ? Number.MAX_SAFE_INTEGER : typeof rows.at[r] === "string" ? Number(BigInt(rows.at[r]) - base) : rows.at[r],
  };
  const heads = $("heads");
  root.style.setProperty("--columns", columns.map((c) => c.width).join(" "));
  for (const column of columns) {
    const head = make("div", column.id === "length" ? "right" : "");
    head.setAttribute("role", "columnheader");
    head.setAttribute("aria-sort", "none");
    head.dataset.id = column.id;
    const button = make("button", "", column.title);
    button.type = "button";
    button.addEventListener("click", () => { sort(column.id, sortBy === column.id ? !down : false); });
    head.append(button);
    heads.append(head);
  }
  const sort = (id, descending) => {
    sortBy = id; down = descending;
    const values = order0.map(key[id]);
    order = [...order0].sort((a, b) => (values[a] < values[b] ? -1 : values[a] > values[b] ? 1 : 0) * (down ? -1 : 1) || a - b);
    for (const head of heads.children) head.setAttribute("aria-sort", head.dataset.id !== id ? "none" : down ? "descending" : "ascending");
    refilter();
  };
  const refilter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = words.length ? haystack() : null;
    shown = order.filter((r) => on[rows.kind[r]] && words.every((w) => text[r].includes(w)));
    count.textContent = shown.length === total ? `${number(total)} ${data.noun}` : `${number(shown.length)} of ${number(total)} ${data.noun}`;
    view.setAttribute("aria-rowcount", String(shown.length));
    $("none").hidden = shown.length > 0;
    // Browsers end at some ten million pixels: longer tables would be scaled.
    pad.style.height = Math.min(shown.length * rowHeight(), 8e6) + "px";
    view.scrollTop = 0;
    paint();
  };
  const paint = () => {
    const h = rowHeight(), real = shown.length * h, scale = real > 8e6 ? (real - view.clientHeight) / (8e6 - view.clientHeight) : 1;
    const top = view.scrollTop * scale, first = Math.max(0, Math.floor(top / h) - 4);
    const last = Math.min(shown.length, Math.ceil((top + view.clientHeight) / h) + 4);
    const lines = [];
    for (let i = first; i < last; i++) {
      const r = shown[i], line = make("div", "line cells");
      line.setAttribute("role", "row");
      line.setAttribute("aria-rowindex", String(i + 1));
      line.setAttribute("aria-selected", String(r === selected));
      line.id = "row" + r;
      line.style.top = (i * h - top + view.scrollTop) + "px";
      for (const column of columns) {
        const text = cell[column.id](r), box = make("div", `c-${column.id}`);
        box.setAttribute("role", "gridcell");
        if (column.id === "kind") {
          box.classList.add("kind");
          const swatch = make("span", "swatch");
          swatch.style.background = `var(--k${rows.kind[r]})`;
          box.append(swatch, make("span", "", text));
        } else box.textContent = text;
        if (column.mono) box.classList.add("mono");
        if (column.id === "length") box.classList.add("right");
        if (column.id === "change") box.classList.add("dim");
        if (column.id === "where" || column.id === "what") box.title = text;
        line.append(box);
      }
      line.addEventListener("click", () => choose(r, false));
      lines.push(line);
    }
    pad.replaceChildren(...lines);
    root.style.setProperty("--bar", view.offsetWidth - view.clientWidth + "px");
  };
  const reveal = (r) => {
    const i = shown.indexOf(r), h = rowHeight();
    if (i < 0) return;
    const real = shown.length * h, scale = real > 8e6 ? (real - view.clientHeight) / (8e6 - view.clientHeight) : 1;
    const top = view.scrollTop * scale;
    if (i * h < top) view.scrollTop = i * h / scale;
    else if ((i + 1) * h > top + view.clientHeight) view.scrollTop = ((i + 1) * h - view.clientHeight) / scale;
  };
  const choose = (r, scroll) => {
    selected = r;
    if (scroll) reveal(r);
    view.setAttribute("aria-activedescendant", "row" + r);
    paint();
    place(r);
    if (map) map.draw();
    const at = addressOf(rows.at[r]);
    if (at !== null) try { history.replaceState(null, "", "#" + hex(at)); } catch (error) { /* not from this origin */ }
  };
  view.addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
  view.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(view.clientHeight / rowHeight()) - 1), here = shown.indexOf(selected);
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, PageDown: here + page, PageUp: here - page, Home: 0, End: shown.length - 1 }[event.key];
    if (to === undefined || !shown.length) return;
    event.preventDefault();
    choose(shown[Math.min(shown.length - 1, Math.max(0, to))], true);
  });
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(refilter, total > 20000 ? 120 : 0); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== search) { event.preventDefault(); search.focus(); }
    if (event.key === "Escape" && document.activeElement === search) { search.value = ""; refilter(); }
  });

  // ---------------------------------------------------------------- one place, side by side
  const place = (r) => {
    const kind = kinds[rows.kind[r]], meta = $("meta");
    $("place").hidden = false;
    $("placename").textContent = whereText(r) || addressText(rows.at[r]);
    const name = make("span", "kind"), swatch = make("span", "swatch");
    swatch.style.background = `var(--k${rows.kind[r]})`;
    name.append(swatch, make("span", "", kind.name));
    meta.replaceChildren(name);
    const what = strings[rows.what[r]], note = strings[rows.note[r]];
    if (rows.at[r] !== null) meta.append(make("span", "mono", addressText(rows.at[r])));
    if (rows.length[r] !== null) meta.append(make("span", "", rows.length[r] === 1 ? "1 byte" : `${number(rows.length[r])} bytes`));
    if (what && data.showWhat) meta.append(make("span", "mono", what));
    $("note").textContent = data.showWhat ? note : what;
    $("note").hidden = !$("note").textContent;
    $("help").textContent = data.showWhat ? kind.help : [kind.help, note].filter(Boolean).join(" ");
    $("help").hidden = !$("help").textContent;
    const sides = titles.map((title, s) => [title, changed(s, r)]).filter(([, code]) => code);
    const box = $("codes");
    box.style.setProperty("--sides", String(sides.length));
    box.replaceChildren(...sides.map(([title, code], s) => side(title, code, sides, s, rows.at[r])));
  };
  const side = (title, code, sides, s, at) => {
    const box = make("div"), head = make("h4"), against = s > 0 ? sides[0][1] : null;
    head.append(make("span", "", title));
    const twin = sides.slice(0, s).find(([, other]) => other[0] === code[0]);
    if (twin) head.append(make("span", "same", `as ${twin[0].toLowerCase()}`));
    const table = make("table"), body = make("tbody");
    let offset = 0;
    for (let i = 1; i < code.length; i += 2) {
      const line = make("tr"), bytes = make("td", "bytes");
      for (let b = offset; b < offset + code[i]; b++) {
        const pair = code[0].slice(2 * b, 2 * b + 2), one = make("i", "", pair);
        if (against && against[0].slice(2 * b, 2 * b + 2) !== pair) one.className = "changed";
        bytes.append(one, document.createTextNode(b + 1 < offset + code[i] ? "\u2009" : ""));
      }
      line.append(bytes, make("td", "", strings[code[i + 1]]));
      line.title = addressText(typeof at === "number" ? at + offset : at);
      body.append(line);
      offset += code[i];
    }
    table.append(body);
    box.append(head, table);
    return box;
  };

  // ---------------------------------------------------------------- map
  const nearest = (list, value) => {  // index of the last element at or below a value
    let low = -1, high = list.length - 1;
    while (low < high) { const middle = (low + high + 1) >> 1; if (list[middle] <= value) low = middle; else high = middle - 1; }
    return low;
  };
  const byAddress = order0.filter((r) => typeof rows.at[r] === "number").sort((a, b) => rows.at[a] - rows.at[b]);
  const starts = byAddress.map((r) => rows.at[r]);
  const rowAt = (from, to) => {  // the first shown row that touches [from, to); loud ones first
    let best = -1;
    for (let i = Math.max(0, nearest(starts, from) - 3); i < byAddress.length && starts[i] < to; i++) {
      const r = byAddress[i];
      if (rows.at[r] + (rows.length[r] ?? 1) <= from || !on[rows.kind[r]]) continue;
      if (best < 0 || (kinds[rows.kind[r]].loud && !kinds[rows.kind[best]].loud)) best = r;
    }
    return best;
  };
  const chart = () => {
    const canvas = $("canvas"), say = $("say"), pen = canvas.getContext("2d", { willReadFrequently: true });
    const size = data.length, flat = data.ranges, runs = flat.length / 3;
    const from = new Float64Array(runs), upto = new Float64Array(runs), kindOf = new Uint8Array(runs);
    for (let i = 0, at = 0; i < runs; i++) {
      at += flat[3 * i]; from[i] = at; at += flat[3 * i + 1]; upto[i] = at; kindOf[i] = flat[3 * i + 2];
    }
    const names = data.symbols, symbolStarts = new Float64Array(names.length / 2);
    for (let i = 0, at = 0; i < symbolStarts.length; i++) symbolStarts[i] = at += names[2 * i];
    const symbolAt = (offset) => {
      const i = nearest(symbolStarts, offset);
      if (i < 0) return "";
      const away = offset - symbolStarts[i];
      return strings[names[2 * i + 1]] + (away ? "+0x" + away.toString(16) : "");
    };
    let low = 0, high = size, cursor = -1, shape = null, tally = null;
    const layout = () => {
      const width = canvas.clientWidth, phone = width < 640, gutter = phone ? 0 : 8 + 7.3 * (wide + 2), edge = phone ? 6 : 10;
      const limit = phone ? 300 : 340, span = high - low;
      for (const c of [16, 12, 10, 8, 6, 5, 4, 3]) {
        // Whole rows of sixteen make addresses that people can read.
        const fit = Math.floor((width - gutter - edge) / c), across = fit - fit % (c > 4 ? 4 : 16), most = Math.floor(limit / c), per = Math.ceil(span / (across * most));
        if (per === 1 || c === 3) return { c, across, per, gutter, edge, width, high: Math.ceil(span / (across * per)) };
      }
      return null;
    };
    const count = () => {  // changed bytes of each kind in each cell of the view
      const { across, per, high: deep } = shape;
      tally = new Float32Array(across * deep * kinds.length);
      for (let i = Math.max(0, nearest(from, low)); i < runs && from[i] < high; i++) {
        for (let at = Math.max(from[i], low), end = Math.min(upto[i], high); at < end;) {
          const n = Math.floor((at - low) / per), next = Math.min(end, low + (n + 1) * per);
          tally[n * kinds.length + kindOf[i]] += next - at;
          at = next;
        }
      }
    };
    const winner = (n) => {
      let best = -1, most = 0;
      for (let k = 0; k < kinds.length; k++) {
        const v = on[k] ? tally[n * kinds.length + k] : 0;
        if (!v) continue;
        if (kinds[k].loud && !(best >= 0 && kinds[best].loud)) { best = k; most = v; }
        else if (v > most && !(best >= 0 && kinds[best].loud && !kinds[k].loud)) { best = k; most = v; }
      }
      return [best, most];
    };
    const draw = () => {
      shape = layout();
      count();
      const { c, across, per, gutter, edge, width, high: deep } = shape, style = getComputedStyle(root), dpr = devicePixelRatio || 1;
      const colours = kinds.map((_, k) => style.getPropertyValue("--k" + k).trim()), empty = style.getPropertyValue("--cell").trim();
      canvas.height = Math.round(deep * c * dpr);
      canvas.width = Math.round(width * dpr);
      canvas.style.height = deep * c + "px";
      Object.assign(canvas.dataset, { cell: c, columns: across, per, gutter, rows: deep, low, high });
      pen.setTransform(dpr, 0, 0, dpr, 0, 0);
      pen.clearRect(0, 0, width, deep * c);
      const gap = c >= 5 ? 1 : 0, cells = Math.ceil((high - low) / per);
      const box = (n) => [gutter + (n % across) * c, Math.floor(n / across) * c, c - gap, c - gap];
      pen.fillStyle = empty;
      if (gap) for (let n = 0; n < cells; n++) pen.fillRect(...box(n));
      else {
        pen.fillRect(gutter, 0, across * c, Math.floor(cells / across) * c);
        pen.fillRect(gutter, Math.floor(cells / across) * c, (cells % across) * c, c);
      }
      const marks = new Set();
      for (let n = 0; n < cells; n++) {
        const [k, bytes] = winner(n);
        if (k < 0) continue;
        const loud = kinds[k].loud;
        pen.globalAlpha = loud || per === 1 ? 1 : Math.min(1, 0.4 + 0.6 * Math.sqrt(Math.min(1, 4 * bytes / per)));
        pen.fillStyle = colours[k];
        pen.fillRect(...box(n));
        if (loud) marks.add(Math.floor(n / across) + " " + k);
      }
      pen.globalAlpha = 1;
      for (const mark of marks) {  // a tick at the right edge: one cell of a hundred thousand is easily missed
        const [row, k] = mark.split(" ");
        pen.fillStyle = colours[k];
        pen.fillRect(gutter + across * c + 3, row * c - (c < 5 ? 1 : 0), edge - 3, Math.max(4, c - 1));
      }
      if (gutter) {
        pen.fillStyle = style.getPropertyValue("--faint");
        pen.font = "12px " + style.getPropertyValue("--mono");
        pen.textBaseline = "top";
        const step = Math.max(1, Math.ceil(40 / c));
        for (let row = 0; row < deep && row * c + 12 <= Math.max(deep * c, 12); row += step) pen.fillText(addressText(low + row * across * per), 0, row * c + 1);
      }
      const ring = (n, colour) => {
        const [x, y, w, h] = box(n);
        pen.strokeStyle = colour;
        pen.lineWidth = 2;
        pen.strokeRect(x - 1, y - 1, w + 2, h + 2);
      };
      if (selected >= 0 && typeof rows.at[selected] === "number" && rows.at[selected] >= low && rows.at[selected] < high)
        ring(Math.floor((rows.at[selected] - low) / per), style.getPropertyValue("--ink"));
      if (cursor >= low && cursor < high && document.activeElement === canvas) ring(Math.floor((cursor - low) / per), style.getPropertyValue("--focus"));
      $("out").disabled = $("whole").disabled = high - low >= size;
      $("in").disabled = per === 1 && high - low <= 512;
    };
    const tell = (n) => {
      const start = low + n * shape.per, end = Math.min(size, start + shape.per), parts = [];
      if (n < 0 || start >= high) { say.textContent = ""; return; }
      let bytes = 0;
      kinds.forEach((kind, k) => {
        const v = tally[n * kinds.length + k];
        if (v) { parts.push(`${kind.name} ${number(v)}`); bytes += v; }
      });
      const range = addressText(start) + (end - start > 1 ? "–" + hex(base + BigInt(end - 1)).slice(-6) : "");
      const first = nearest(from, end - 1), at = first >= 0 && upto[first] > start ? Math.max(start, from[first]) : start;
      say.replaceChildren(make("b", "mono", range), document.createTextNode("  "), make("span", "mono", symbolAt(at)),
        document.createTextNode("  " + (parts.length ? parts.join(", ") + (end - start > 1 ? ` of ${number(end - start)} bytes` : "") : data.plain ? data.plain.name : "")));
    };
    const cellOf = (event) => {
      const { c, across, gutter, high: deep } = shape;
      const box = canvas.getBoundingClientRect(), x = Math.floor((event.clientX - box.left - gutter) / c), y = Math.floor((event.clientY - box.top) / c);
      return x < 0 || x >= across || y < 0 || y >= deep ? -1 : y * across + x;
    };
    const take = (n) => {
      if (n < 0) return;
      cursor = low + n * shape.per;
      const r = rowAt(cursor, cursor + shape.per);
      if (r >= 0) choose(r, true);
      tell(n);
    };
    const zoom = (factor) => {
      const middle = cursor >= low && cursor < high ? cursor : (low + high) / 2, span = Math.min(size, Math.max(512, Math.round((high - low) * factor)));
      low = Math.max(0, Math.min(size - span, Math.floor(middle - span / 2)));
      low -= low % 16;
      high = Math.min(size, low + span);
      draw();
    };
    canvas.addEventListener("pointermove", (event) => tell(cellOf(event)));
    canvas.addEventListener("click", (event) => take(cellOf(event)));
    canvas.addEventListener("dblclick", () => zoom(1 / 8));
    canvas.addEventListener("focus", draw);
    canvas.addEventListener("blur", draw);
    canvas.addEventListener("keydown", (event) => {
      const { across, per } = shape;
      const step = { ArrowLeft: -per, ArrowRight: per, ArrowUp: -across * per, ArrowDown: across * per }[event.key];
      if (step !== undefined) {
        cursor = Math.max(0, Math.min(size - 1, (cursor < 0 ? low - step : cursor) + step));
        if (cursor < low || cursor >= high) {
          const span = high - low;
          low = Math.max(0, Math.min(size - span, cursor - (cursor < low ? Math.floor(span / 2) : Math.floor(span / 2))));
          high = low + span;
        }
        draw();
        tell(Math.floor((cursor - low) / per));
      } else if (event.key === "Enter" && cursor >= 0) take(Math.floor((cursor - low) / per));
      else if (event.key === "+" || event.key === "=") zoom(1 / 4);
      else if (event.key === "-") zoom(4);
      else if (event.key === "0") zoom(Infinity);
      else return;
      event.preventDefault();
    });
    $("in").addEventListener("click", () => zoom(1 / 4));
    $("out").addEventListener("click", () => zoom(4));
    $("whole").addEventListener("click", () => zoom(Infinity));
    return { draw };
  };
  if (data.length) { map = chart(); }
  else $("mapsection").hidden = true;

  addEventListener("resize", () => { paint(); refit(); });
  const refit = () => { if (map) map.draw(); };
  if (total) $("tablesection").hidden = false;
  refilter();
  refit();
  // A link to a place opens it; else the first loud one is shown, so that nobody has to look for it.
  const link = /^#(0x[0-9a-f]+)$/i.exec(location.hash);
  const open = link ? order0.find((r) => rows.at[r] !== null && hex(addressOf(rows.at[r])) === link[1].toLowerCase())
    : order0.find((r) => kinds[rows.kind[r]].loud);
  if (open !== undefined) choose(open, true);
  root.dataset.ready = "yes";
})();

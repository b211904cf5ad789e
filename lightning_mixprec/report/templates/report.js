"use strict";
// Filter by layer, zoom in time, tooltips with exact values. Texts are set by textContent alone.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [first, last] = data.span;
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const tip = byId("tip"), cursor = byId("cursor"), selection = byId("selection");
  const whole = (number) => number.toLocaleString("en-US");
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  let from = first, to = last;

  // Words ------------------------------------------------------------------------------------------------------------

  const percent = (share) => (share > 0 && share < 1e-5 ? "< 0.001\u00a0%" : `${+(100 * share).toPrecision(3)}\u00a0%`);
  const codeDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

  // Undoes `pack` of view.py: the value of cell k, null where nothing was measured.
  function cell(key, codes, k) {
    if (k < 0 || 2 * k >= codes.length) return null;
    const code = 64 * codeDigits.indexOf(codes[2 * k]) + codeDigits.indexOf(codes[2 * k + 1]);
    if (code === 4095) return null;
    if (key === "headroom_bits" || key === "sqnr_db") return (code - 1000) / 10;
    return code === 0 ? 0 : +`${10 + (code - 1) % 90}e${Math.floor((code - 1) / 90) - 31}`;
  }

  const shows = {
    underflow_rate: percent,
    headroom_bits: (bits) => `${bits} bits${bits < 0 ? ", overflow" : ""}`,
    grad_cosine: (distance) => `cosine ${+(1 - distance).toFixed(9)}, 1 − cosine = ${distance}`,
    sqnr_db: (decibels) => `${decibels} dB`,
  };
  const steps = (start, end) => (end - start === 1 ? `step ${whole(start)}` : `steps ${whole(start)} to ${whole(end - 1)}`);
  const binOf = (edges, step) => edges.findIndex((edge, k) => k + 1 < edges.length && edge <= step && step < edges[k + 1]);

  function curveLines(run, step) {
    const curve = run.curve, k = binOf(curve.edges, step);
    if (k < 0) return [`step ${whole(step)}`, "nothing recorded"];
    const lines = [steps(curve.edges[k], curve.edges[k + 1])];
    if (curve.loss[k] !== null) lines.push(`loss ${curve.loss[k]} (${curve.loss_min[k]} to ${curve.loss_max[k]})`);
    if (curve.scale[k] !== null) lines.push(`loss scale ${whole(curve.scale[k])}`);
    if (curve.skipped[k]) lines.push(`${curve.skipped[k]} skipped`);
    return lines.length > 1 ? lines : [...lines, "no loss recorded"];
  }

  function rowLines(run, kind, row, step) {
    if (kind === "format") {
      const span = row.spans.find(([start, end]) => start <= step && step < end);
      return span ? [row.label, `${span[2]}, ${steps(span[0], span[1])}`] : [row.label, "not recorded"];
    }
    const heat = data.heats.findIndex((each) => each.key === kind), k = binOf(run.edges, step);
    const value = cell(kind, row.cells[heat], k);
    const when = k < 0 ? `step ${whole(step)}` : steps(run.edges[k], run.edges[k + 1]);
    return [row.label, when, value === null ? "not measured" : shows[kind](value)];
  }

  function barLines(counted, exponent) {
    const total = counted.counts.reduce((sum, count) => sum + count, 0);
    const count = counted.counts[exponent - counted.lowest] || 0;
    return [`2^${exponent} to 2^${exponent + 1}`, `${whole(count)} elements${total ? `, ${percent(count / total)}` : ""}`];
  }

  // Tooltip ----------------------------------------------------------------------------------------------------------

  let current = null;

  function showTip(lines, x, y) {
    tip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${clamp(x + 14, 4, innerWidth - box.width - 4)}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18}px`;
  }

  function hideTip() {
    tip.hidden = cursor.hidden = true;
    if (current) current.classList.remove("cur");
    current = null;
  }

  function placeOver(element, box, left, width) {
    element.style.left = `${left + scrollX}px`;
    element.style.top = `${box.top + scrollY}px`;
    element.style.height = `${box.height}px`;
    if (width !== undefined) element.style.width = `${width}px`;
    element.hidden = false;
  }

  for (const body of all(".rows")) {
    for (const [place, row] of [...body.rows].entries()) { row.dataset.r = place; row.classList.add("fl"); }
  }
  const isTime = (pane) => pane.dataset.h === undefined;
  const linesOf = (pane, row, at) => {
    const run = data.runs[pane.dataset.run], kind = pane.dataset.kind;
    if (!isTime(pane)) return barLines(run.histograms[pane.dataset.h][kind], at);
    return kind === "curve" ? curveLines(run, at) : rowLines(run, kind, run.rows[row.dataset.r], at);
  };
  const rowsOf = (pane) => (pane.dataset.kind === "curve" || !isTime(pane)
    ? all("tr.tall, tr.mid", pane).slice(0, 1) : all("tr.fl:not([hidden])", pane));
  const plotOf = (pane, row) => (row || pane).querySelector("svg.t, svg.h");
  function limitsOf(pane) {
    if (isTime(pane)) return [from, to];
    const [x, , width] = pane.querySelector("svg.h").getAttribute("viewBox").split(" ").map(Number);
    return [x, x + width];
  }

  function point(pane, row, at, pixel) {
    const svg = plotOf(pane, row), box = svg.getBoundingClientRect(), [low, high] = limitsOf(pane);
    const x = pixel ? pixel[0] : clamp(box.left + box.width * (at + 0.5 - low) / (high - low), box.left, box.right);
    hideTip();
    if (row.dataset.r !== undefined) { current = row; row.classList.add("cur"); }
    placeOver(cursor, box, x);
    showTip(linesOf(pane, row, at), x, pixel ? pixel[1] : box.top);
  }

  function hover(event) {
    const pane = event.target.closest(".pane[data-kind]"), mark = event.target.closest(".mk");
    if (mark) return showMark(mark);
    const row = pane && (pane.dataset.kind === "curve" || !isTime(pane) ? rowsOf(pane)[0] : event.target.closest("tr.fl"));
    const svg = row && plotOf(pane, row), box = svg && svg.getBoundingClientRect();
    if (!box || event.clientX < box.left || event.clientX >= box.right) return hideTip();
    const [low, high] = limitsOf(pane);
    return point(pane, row, Math.floor(low + (high - low) * (event.clientX - box.left) / box.width), [event.clientX, event.clientY]);
  }

  function showMark(mark) {
    const box = mark.querySelector("path").getBoundingClientRect();
    hideTip();
    showTip(mark.getAttribute("aria-label").split("; "), box.right, box.top);
  }

  // Zoom -------------------------------------------------------------------------------------------------------------

  const svgNode = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const place = (step) => 100 * (step - from) / (to - from);

  function drawAxis(axis) {
    const count = clamp(Math.floor(axis.getBoundingClientRect().width / 85), 2, 10);
    const raw = Math.max((to - from) / count, 1), base = 10 ** Math.floor(Math.log10(raw));
    const stride = [1, 2, 5, 10].map((factor) => factor * base).find((each) => each >= raw * (1 - 1e-9));
    const ticks = [];
    for (let step = Math.ceil(from / stride) * stride; step <= to; step += stride) {
      const at = place(step), anchor = at < 3 ? "start" : at > 97 ? "end" : "middle";
      ticks.push(svgNode("text", { x: `${at}%`, y: 12, "text-anchor": anchor }, whole(step)));
    }
    axis.replaceChildren(...ticks);
  }

  function drawNames(row, spans) {
    const old = row.querySelector(".names"), names = old || svgNode("svg", { class: "names", "aria-hidden": "true" });
    const parts = spans.map(([start, end, name]) => [Math.max(start, from), Math.min(end, to), name]);
    names.replaceChildren(...parts.filter(([start, end]) => (end - start) / (to - from) > 0.09).map(([start, end, name]) =>
      svgNode("text", { x: `${place((start + end) / 2)}%`, y: "50%" }, name)));
    if (!old) row.cells[1].append(names);
  }

  // Where x is 0 in a chart, and how many steps its unit is: as `cells_of` of charts.py has it for heat maps.
  function unitOf(pane) {
    const edges = data.runs[pane.dataset.run].edges, heat = data.heats.some((each) => each.key === pane.dataset.kind);
    return heat && edges.length > 1 ? [edges[0], (edges[edges.length - 1] - edges[0]) / (edges.length - 1)] : [0, 1];
  }

  function draw() {
    for (const pane of all(".pane[data-kind]").filter(isTime)) {
      const [origin, unit] = unitOf(pane), start = (from - origin) / unit, width = (to - from) / unit;
      for (const svg of all("svg.t", pane)) {
        const [, y, , height] = svg.getAttribute("viewBox").split(" ");
        svg.setAttribute("viewBox", `${start} ${y} ${width} ${height}`);
      }
    }
    for (const mark of all(".mk")) mark.setAttribute("x", `${place(+mark.dataset.x)}%`);
    for (const axis of all(".pane:not([data-h]) .ax")) drawAxis(axis);
    for (const pane of all('.pane[data-kind="format"]')) {
      for (const row of all("tr.fl", pane)) drawNames(row, data.runs[pane.dataset.run].rows[row.dataset.r].spans);
    }
    byId("range").textContent = `steps ${whole(from)} to ${whole(to)}`;
    const full = from === first && to === last;
    for (const id of ["reset", "out"]) byId(id).disabled = full;
    byId("earlier").disabled = from === first;
    byId("later").disabled = to === last;
    byId("in").disabled = to - from <= 1;
  }

  function zoom(start, end) {
    const length = clamp(Math.round(end - start), 1, last - first);
    from = clamp(Math.round(start), first, last - length);
    to = from + length;
    hideTip();
    draw();
  }

  const scaleBy = (factor, at = (from + to) / 2) => zoom(at - (at - from) * factor, at + (to - at) * factor);
  const pan = (sign) => { const by = sign * Math.max(1, Math.round((to - from) / 4)); zoom(from + by, to + by); };
  const actions = { in: () => scaleBy(0.5), out: () => scaleBy(2), reset: () => zoom(first, last), earlier: () => pan(-1), later: () => pan(1) };
  for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);

  let drag = null;

  function startDrag(event) {
    if (event.pointerType === "touch") return hover(event);
    const pane = event.target.closest(".pane[data-kind]");
    if (!pane || !isTime(pane) || event.button !== 0 || event.target.closest(".mk")) return undefined;
    const svg = plotOf(pane, rowsOf(pane)[0]), box = svg && svg.getBoundingClientRect();
    if (!box || event.clientX < box.left || event.clientX > box.right) return undefined;
    drag = { pane, box, x: event.clientX };
    event.preventDefault();
    return pane.focus({ preventScroll: true });
  }

  function moveDrag(event) {
    if (!drag) return hover(event);
    const x = clamp(event.clientX, drag.box.left, drag.box.right), pane = drag.pane.getBoundingClientRect();
    hideTip();
    return placeOver(selection, pane, Math.min(x, drag.x), Math.abs(x - drag.x));
  }

  function endDrag(event) {
    if (!drag) return;
    const x = clamp(event.clientX, drag.box.left, drag.box.right), scale = (to - from) / drag.box.width;
    const [low, high] = [Math.min(x, drag.x), Math.max(x, drag.x)].map((each) => from + (each - drag.box.left) * scale);
    const enough = Math.abs(x - drag.x) > 5;
    drag = null;
    selection.hidden = true;
    if (enough) zoom(Math.floor(low), Math.max(Math.ceil(high), Math.floor(low) + 1));
  }

  // Keyboard ---------------------------------------------------------------------------------------------------------

  const places = new WeakMap();

  function widthOfStep(pane) {
    const run = data.runs[pane.dataset.run], kind = pane.dataset.kind;
    const edges = !isTime(pane) ? [0, 1] : kind === "curve" ? run.curve.edges : run.edges;
    return Math.max(1, edges.length > 1 ? Math.floor((edges[edges.length - 1] - edges[0]) / (edges.length - 1)) : 1);
  }

  function read(pane, across, down) {
    const rows = rowsOf(pane);
    if (!rows.length) return;
    const [low, high] = limitsOf(pane);
    const old = places.get(pane) || { row: 0, at: low - (across > 0 ? widthOfStep(pane) : 0) };
    const row = clamp(old.row + down, 0, rows.length - 1);
    const at = clamp(Math.floor(old.at + across * widthOfStep(pane)), low, high - 1);
    places.set(pane, { row, at });
    rows[row].scrollIntoView({ block: "nearest" });
    point(pane, rows[row], at);
  }

  function onKey(event) {
    if (event.key === "Escape") return hideTip();
    const mark = event.target.closest(".mk"), pane = event.target.closest(".pane[data-kind]");
    const across = { ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0, down = { ArrowUp: -1, ArrowDown: 1 }[event.key] || 0;
    if (event.ctrlKey || event.metaKey || event.altKey || !pane) return undefined;
    const zooms = { "+": actions.in, "=": actions.in, "-": actions.out, 0: actions.reset };
    if (zooms[event.key] && isTime(pane)) zooms[event.key]();
    else if (mark && across) nextMark(mark, across);
    else if (event.shiftKey && across && isTime(pane)) pan(across);
    else if (across || down) read(pane, across, down);
    else return undefined;
    return event.preventDefault();
  }

  function nextMark(mark, across) {
    const marks = all(".mk", mark.closest(".marks")), next = marks[marks.indexOf(mark) + across];
    if (!next) return;
    mark.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    if (+next.dataset.x < from || +next.dataset.x > to) zoom(+next.dataset.x - (to - from) / 2, +next.dataset.x + (to - from) / 2);
    next.focus();
  }

  // Filter -----------------------------------------------------------------------------------------------------------

  const cellText = (row, place) => row.cells[place].textContent;
  const assigned = data.runs.map((_, run) => all("tr.fl", all("#assignment .run")[run]).map((row) => cellText(row, 0)));
  const layersOf = (row, run) => row.layers || (row.assigned ? assigned[run].slice(...row.assigned) : [row.label]);
  const layers = new Set([...assigned.flat(), ...data.runs.flatMap((each, run) => each.rows.flatMap((row) => layersOf(row, run)))]);

  function namesOf(element) {
    if (element.dataset.r === undefined) return [element.dataset.l ?? cellText(element, element.dataset.m ?? 0)];
    const run = element.closest(".pane").dataset.run, row = data.runs[run].rows[element.dataset.r];
    return [row.label, ...layersOf(row, run)];
  }

  function filter() {
    const wanted = byId("filter").value.trim().toLowerCase();
    const fits = (name) => name.toLowerCase().includes(wanted);
    for (const element of all(".fl")) element.hidden = wanted !== "" && !namesOf(element).some(fits);
    for (const none of all(".none")) none.hidden = Boolean(none.previousElementSibling.querySelector(".fl:not([hidden])"));
    const count = [...layers].filter(fits).length;
    byId("count").textContent = wanted ? `${whole(count)} of ${whole(layers.size)} layers` : `${whole(layers.size)} layers`;
    hideTip();
  }

  // Start ------------------------------------------------------------------------------------------------------------

  byId("filter").addEventListener("input", filter);
  byId("filter").addEventListener("keydown", (event) => {
    if (event.key === "Escape") { byId("filter").value = ""; filter(); }
  });
  document.addEventListener("pointerdown", startDrag);
  document.addEventListener("pointermove", moveDrag);
  document.addEventListener("pointerup", endDrag);
  document.addEventListener("pointercancel", () => { drag = null; selection.hidden = true; });
  document.addEventListener("keydown", onKey);
  document.addEventListener("focusin", (event) => {
    const mark = event.target.closest(".mk");
    if (mark) showMark(mark);
    else if (event.target.matches(".pane[data-kind]") && event.target.matches(":focus-visible")) read(event.target, 0, 0);
  });
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", () => { if (!document.activeElement.matches(".pane, .mk")) hideTip(); }, true);
  addEventListener("resize", draw);
  addEventListener("beforeprint", () => { for (const each of all("details")) each.open = true; });
  byId("tools").hidden = false;
  filter();
  draw();
})();

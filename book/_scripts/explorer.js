// Read any cell of any CKA map, by mouse, touch or keyboard. A study's data are a script of its own
// (lib/site/explorer.py), which is loaded when the study is chosen.
"use strict";

{
  const root = document.getElementById("maps");
  const part = Object.fromEntries(
    [...root.querySelectorAll("[data-part]")].map((found) => [found.dataset.part, found]),
  );
  const { study, rows, columns, blocks, map, reading, scale, mark } = part;
  const canvas = map.getContext("2d");
  const margin = { left: 52, bottom: 44, top: 8, right: 8 };
  const [CKA, MARGIN] = [0, 1];
  const studies = new Map(); // what has been loaded
  let data; // of the chosen study
  let sides; // { rows, columns }: a role's name, with the index and the name of each tap shown
  let here; // the cell that is read, { row, column }
  let cell; // its size in CSS pixels

  // The table of pairs is triangular: each tap with those up to itself.
  const value = (kind, one, other) => {
    const [high, low] = one > other ? [one, other] : [other, one];
    const found = data.bytes[(kind * data.bytes.length) / 2 + (high * (high + 1)) / 2 + low];
    return found === data.undefined ? null : found / 100;
  };

  const valueAt = (kind, { row, column }) =>
    value(kind, sides.rows.taps[row].index, sides.columns.taps[column].index);

  const side = (role) => {
    const places = blocks.checked ? role.blocks : role.layers.keys();
    const taps = [...places].map((place) => ({
      index: role.first + place,
      name: role.layers[place],
      number: role.blocks.includes(place) ? role.layers[place].match(/\d+/g)?.join(".") : null,
    }));
    return { name: role.name, taps };
  };

  const read = () => {
    const names = ["rows", "columns"].map((which) => {
      const tap = sides[which].taps[which === "rows" ? here.row : here.column];
      return `${sides[which].name}, ${tap.name}`;
    });
    const [cka, margin] = [CKA, MARGIN].map((kind) => valueAt(kind, here));
    const interval = margin === null ? "no interval"
      : [cka - margin, cka + margin].map((end) => end.toFixed(2)).join(", ");
    const said = cka === null ? "undefined, a layer does not vary" : `${cka.toFixed(2)} [${interval}]`;
    reading.textContent = `${names.join(" × ")}: CKA ${said}`;
    mark.hidden = cka === null;
    mark.style.left = `${100 * Math.min(1, Math.max(0, cka))}%`;
  };

  // One pixel per cell, enlarged when drawn.
  const picture = () => {
    const [height, width] = [sides.rows.taps.length, sides.columns.taps.length];
    const small = new OffscreenCanvas(width, height);
    const context = small.getContext("2d");
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < width; column++) {
        const cka = valueAt(CKA, { row, column });
        const shade = Math.round(100 * Math.min(1, Math.max(0, cka)));
        context.fillStyle = cka === null ? "#ccc" : data.colours[shade];
        context.fillRect(column, height - 1 - row, 1, 1);
      }
    }
    return small;
  };

  const ticks = (taps) => {
    const outputs = [...taps.keys()].filter((place) => taps[place].number);
    const count = outputs.length > 8 ? 5 : outputs.length;
    const chosen = Array.from({ length: count }, (_, i) =>
      outputs[Math.round((i * (outputs.length - 1)) / Math.max(1, count - 1))]);
    return chosen.map((place) => ({ place, text: taps[place].number }));
  };

  const draw = () => {
    const [height, width] = [sides.rows.taps.length, sides.columns.taps.length];
    const room = map.parentElement.clientWidth - margin.left - margin.right;
    cell = Math.min(room / width, Math.max(240, 0.65 * innerHeight) / height, 48);
    const [across, up] = [cell * width, cell * height];
    const size = [margin.left + across + margin.right, margin.top + up + margin.bottom];
    const ratio = devicePixelRatio || 1;
    [map.width, map.height] = size.map((length) => Math.round(length * ratio));
    [map.style.width, map.style.height] = size.map((length) => `${length}px`);
    canvas.setTransform(ratio, 0, 0, ratio, 0, 0);
    canvas.imageSmoothingEnabled = false;
    canvas.drawImage(sides.picture, margin.left, margin.top, across, up);

    const style = getComputedStyle(root);
    canvas.fillStyle = style.color;
    canvas.textAlign = "center";
    canvas.font = `12px ${style.fontFamily}`;
    for (const { place, text } of ticks(sides.columns.taps)) {
      canvas.fillText(text, margin.left + (place + 0.5) * cell, margin.top + up + 15);
    }
    canvas.textAlign = "right";
    for (const { place, text } of ticks(sides.rows.taps)) {
      canvas.fillText(text, margin.left - 6, margin.top + up - (place + 0.5) * cell + 4);
    }
    canvas.textAlign = "center";
    canvas.font = `14px ${style.fontFamily}`;
    canvas.fillText(`${sides.columns.name} →`, margin.left + across / 2, size[1] - 8);
    canvas.save();
    canvas.translate(14, margin.top + up / 2);
    canvas.rotate(-Math.PI / 2);
    canvas.fillText(`${sides.rows.name} →`, 0, 0);
    canvas.restore();

    const [x, y] = [margin.left + here.column * cell, margin.top + up - (here.row + 1) * cell];
    const [middle, centre] = [x + cell / 2, y + cell / 2];
    canvas.strokeStyle = "#3cf";
    canvas.beginPath();
    canvas.moveTo(margin.left, centre);
    canvas.lineTo(x, centre);
    canvas.moveTo(middle, y + cell);
    canvas.lineTo(middle, margin.top + up);
    canvas.stroke();
    const wide = Math.max(cell, 7); // a cell of a phone's pixels would be lost
    for (const [colour, line] of [["#000", 4], ["#3cf", 2]]) {
      canvas.strokeStyle = colour;
      canvas.lineWidth = line;
      canvas.strokeRect(middle - wide / 2, centre - wide / 2, wide, wide);
    }
    canvas.lineWidth = 1;
  };

  const move = (row, column) => {
    const within = (place, which) => Math.max(0, Math.min(sides[which].taps.length - 1, place));
    here = { row: within(row, "rows"), column: within(column, "columns") };
    draw();
    read();
  };

  const show = () => {
    sides = { rows: side(data.roles[rows.value]), columns: side(data.roles[columns.value]) };
    sides.picture = picture();
    map.ariaLabel = `CKA of ${sides.rows.name} with ${sides.columns.name}; arrow keys move from cell to cell`;
    const half = (which) => Math.floor(sides[which].taps.length / 2);
    move(half("rows"), half("columns"));
  };

  const load = () => {
    if (studies.has(study.value)) return choose();
    const script = document.createElement("script");
    script.src = `_static/explorer/${study.value}.js`;
    document.head.append(script);
  };

  globalThis.explorerStudy = (loaded) => {
    studies.set(loaded.study, loaded);
    if (loaded.study === study.value) choose();
  };

  const choose = () => {
    data = studies.get(study.value);
    data.bytes ??= new Int8Array(Uint8Array.from(atob(data.values), (c) => c.charCodeAt(0)).buffer);
    for (const select of [rows, columns]) {
      select.replaceChildren(...data.roles.map(({ name }, place) => new Option(name, place)));
    }
    columns.value = Math.max(0, data.roles.findIndex(({ name }) => name === "ResNet"));
    scale.style.background = `linear-gradient(to right, ${data.colours})`;
    show();
  };

  const point = (event) => {
    const box = map.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - margin.left) / cell);
    const row = sides.rows.taps.length - 1 - Math.floor((event.clientY - box.top - margin.top) / cell);
    const inside = sides.rows.taps[row] && sides.columns.taps[column];
    if (inside && (row !== here.row || column !== here.column)) move(row, column);
  };

  const keys = {
    ArrowUp: () => [here.row + 1, here.column],
    ArrowDown: () => [here.row - 1, here.column],
    ArrowRight: () => [here.row, here.column + 1],
    ArrowLeft: () => [here.row, here.column - 1],
    PageUp: () => [Infinity, here.column],
    PageDown: () => [0, here.column],
    Home: () => [here.row, 0],
    End: () => [here.row, Infinity],
  };

  map.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    move(...keys[event.key]());
  });
  map.addEventListener("pointermove", point);
  map.addEventListener("pointerdown", point);
  for (const control of [rows, columns, blocks]) control.addEventListener("change", show);
  study.addEventListener("change", load);
  new ResizeObserver(() => data && draw()).observe(map.parentElement);
  new MutationObserver(() => data && draw()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  root.hidden = false;
  load();
}

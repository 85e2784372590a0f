// Tables and pictures as files, made of what the page holds; nothing is asked of any network.

function download(name, content, type) {
  const address = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const link = make("a", { href: address, download: `${DATA.file || DATA.tasks.join("-")}-${name}`.replace(/[^\p{L}\p{N}._-]+/gu, "_") });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** A spreadsheet runs text that begins like a formula: it gets an apostrophe in front. */
function csvCell(cell) {
  if (typeof cell === "number") return Number.isNaN(cell) ? "" : String(cell);
  const text = /^[\s\0\u200b\ufeff]*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]/.test(cell) ? `'${cell}` : cell;
  return `"${text.replaceAll('"', '""')}"`;
}

const toCsv = (rows) => rows.map((row) => row.map(csvCell).join(",")).join("\n") + "\n";

function csvButton(name, rows) {
  return make("button", { type: "button", class: "download", "data-file": `${name}.csv`, onclick: () => download(`${name}.csv`, toCsv(rows()), "text/csv") }, "CSV");
}

function pictureButton(name, kind, save) {
  return make("button", { type: "button", class: "download", "data-file": `${name}.${kind}`, onclick: () => save(`${name}.${kind}`) }, kind.toUpperCase());
}

const DRAWN = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "opacity", "font-size", "font-family", "font-weight"];

/** All charts of a part of the page as one SVG that carries its own looks. */
function saveCharts(id, title) {
  return (file) => {
    const drawings = [...document.querySelectorAll(`#${id} svg`)];
    const sizes = drawings.map((svg) => svg.viewBox.baseVal);
    const whole = makeSvg("svg", { xmlns: "http://www.w3.org/2000/svg", width: sizes.reduce((sum, { width }) => sum + width + 16, 16), height: sizes[0].height + 58 });
    const style = getComputedStyle(document.body);
    whole.append(makeSvg("rect", { width: "100%", height: "100%", fill: getComputedStyle(document.documentElement).getPropertyValue("--card") }));
    const write = (text, x, y, weight) => whole.append(makeSvg("text", { x, y, fill: style.color, "font-family": "sans-serif", "font-size": 13, "font-weight": weight }, text));
    write(`${DATA.title}: ${title()}`, 16, 20, 600);
    let x = 16;
    drawings.forEach((svg, place) => {
      const copy = svg.cloneNode(true);
      const [originals, copies] = [svg, copy].map((root) => [...root.querySelectorAll("*")]);
      originals.forEach((original, at) => {
        const looks = getComputedStyle(original);
        DRAWN.forEach((name) => copies[at].setAttribute(name, looks.getPropertyValue(name)));
        copies[at].removeAttribute("class");
      });
      Object.entries({ x, y: 50, width: sizes[place].width, height: sizes[place].height }).forEach(([name, value]) => copy.setAttribute(name, value));
      write(svg.parentElement.querySelector("h3").textContent, x, 42, 400);
      whole.append(copy);
      x += sizes[place].width + 16;
    });
    download(file, new XMLSerializer().serializeToString(whole), "image/svg+xml");
  };
}

/** The heatmaps side by side, with their titles and scales, as one PNG. */
function saveMaps(file) {
  const gap = 24, head = 58, foot = 44;
  const width = MAPS.reduce((sum, map) => sum + map.size.width + gap, gap);
  const canvas = make("canvas");
  const context = prepare(canvas, width, head + MAPS[0].size.height + foot);
  const style = getComputedStyle(document.documentElement);
  context.fillStyle = style.getPropertyValue("--card");
  context.fillRect(0, 0, width, head + MAPS[0].size.height + foot);
  context.fillStyle = style.getPropertyValue("--ink");
  context.font = "600 14px system-ui, sans-serif";
  context.fillText(`${DATA.title}: ${VALUES[STATE.value].title}`, gap, 24, width - 2 * gap);
  context.font = "12px system-ui, sans-serif";
  let x = gap;
  for (const map of MAPS) {
    const bottom = head + map.size.height;
    context.textAlign = "left";
    context.fillText(`${map.block.name}: layer × ${map.block.axis}`, x, head - 10, map.size.width);
    context.drawImage(map.canvas, x, head, map.size.width, map.size.height);
    context.drawImage(map.bar, x, bottom + 6, map.size.width, 10);
    map.ends.forEach((end, place) => {
      context.textAlign = ["left", "center", "right"][place];
      context.fillText(end.textContent, x + (map.size.width * place) / 2, bottom + 32);
    });
    x += map.size.width + gap;
  }
  canvas.toBlob((blob) => download(file, blob), "image/png");
}

"use strict";
// Hover readout of the charts: the nearest point of every line.
for (const svg of document.querySelectorAll("svg.chart")) {
  const data = JSON.parse(svg.dataset.chart), cursor = svg.querySelector(".cursor"), figure = svg.parentElement;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  const line = (text, color) => {
    const row = document.createElement("div");
    row.textContent = text;
    if (color) row.style.color = color;
    tip.append(row);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * data.width;
    const share = (at - data.px[0]) / (data.px[1] - data.px[0]);
    const x = nearest(data.series.flatMap((s) => s.points), data.x[0] + share * (data.x[1] - data.x[0]))[0];
    const shown = data.px[0] + ((x - data.x[0]) / (data.x[1] - data.x[0])) * (data.px[1] - data.px[0]);
    cursor.setAttribute("x1", shown);
    cursor.setAttribute("x2", shown);
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren();
    line("step " + x);
    for (const s of data.series) {
      const p = nearest(s.points, x);
      line(s.name + ": " + p[1] + (p[0] === x ? "" : " (step " + p[0] + ")"), s.color);
    }
    tip.hidden = false;
    const left = (shown / data.width) * box.width;
    tip.style.left = Math.max(0, left > box.width / 2 ? left - tip.offsetWidth - 10 : left + 10) + "px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  });
}

// Cases: order and filters.
const grid = document.querySelector(".cases");
if (grid) {
  const cards = [...grid.children];
  const value = (id) => (document.getElementById(id) || { value: "" }).value;
  const update = () => {
    const label = value("by-label"), set = value("by-set"), kind = value("by-kind");
    let shown = 0;
    for (const card of cards) {
      const { labels, set: cardSet, kinds } = card.dataset;
      card.hidden = !((!label || labels.split("|").includes(label)) && (!set || cardSet === set)
        && (!kind || kinds.split(" ").includes(kind)));
      shown += !card.hidden;
    }
    document.getElementById("shown").textContent = shown + " of " + cards.length + " cases shown";
  };
  for (const button of document.querySelectorAll("button[data-sort]")) {
    button.addEventListener("click", () => {
      const sign = button.dataset.sort === "best" ? -1 : 1;
      cards.sort((a, b) => sign * (a.dataset.score - b.dataset.score) || a.dataset.order - b.dataset.order);
      grid.append(...cards);
      for (const other of document.querySelectorAll("button[data-sort]"))
        other.setAttribute("aria-pressed", String(other === button));
    });
  }
  for (const select of document.querySelectorAll(".controls select")) select.addEventListener("change", update);
  update();
}

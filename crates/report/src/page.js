"use strict";
(() => {
  // Text only ever enters the page through textContent.
  const tip = document.createElement("div");
  tip.id = "tip"; tip.setAttribute("role", "tooltip"); tip.hidden = true;
  document.body.append(tip);
  const show = (rows, box) => {
    tip.replaceChildren(...rows.filter(r => r[1] !== "").map(entry => {
      if (entry instanceof Element) return entry;
      const [name, value] = entry;
      const row = document.createElement("div"), key = document.createElement("span"), val = document.createElement("b");
      key.textContent = name; val.textContent = value; row.append(key, val); return row;
    }));
    tip.hidden = false;
    const w = tip.offsetWidth, h = tip.offsetHeight, d = document.documentElement;
    tip.style.left = Math.max(4, Math.min(box.left, d.clientWidth - w - 8)) + "px";
    tip.style.top = (box.bottom + h + 8 < d.clientHeight ? box.bottom + 6 : Math.max(4, box.top - h - 6)) + "px";
  };
  const hide = () => { tip.hidden = true; twins.splice(0).forEach(t => t.classList.remove("twin")); };

  const twins = [];
  const names = ["id", "policy log p (nats)", "reference log p (nats)", "implicit reward", "true reward"];
  const token = target => target instanceof Element ? target.closest(".tokens>span") : null;
  const text = t => [...t.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join("");
  const open = t => {
    hide();
    // Either the page's script knows the token, or its numbers stand beside it.
    const parts = (t.dataset.d ?? "").split(";");
    const rows = t.readout ? t.readout() : [["token", JSON.stringify(text(t))],
      ...names.map((name, i) => [name, parts[i]]), ["kind", parts.slice(names.length).join(";")]];
    show(rows, t.getClientRects()[0] || t.getBoundingClientRect());
    t.setAttribute("aria-describedby", "tip");
    const group = t.closest(".readouts"), i = [...t.parentNode.children].indexOf(t);
    if (group) for (const line of group.querySelectorAll(".tokens")) {
      const twin = line.children[i];
      if (twin && twin !== t) { twin.classList.add("twin"); twins.push(twin); }
    }
  };
  document.addEventListener("mouseover", e => { const t = token(e.target); if (t) open(t); });
  document.addEventListener("mouseout", e => { if (token(e.target)) hide(); });
  document.addEventListener("focusin", e => { const t = token(e.target); if (t) open(t); });
  document.addEventListener("focusout", e => { if (token(e.target)) hide(); });
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", e => {
    if (e.key === "Escape") return hide();
    const t = token(e.target);
    if (!t) return;
    const next = { ArrowRight: t.nextElementSibling, ArrowLeft: t.previousElementSibling,
      Home: t.parentNode.firstElementChild, End: t.parentNode.lastElementChild }[e.key];
    if (!next) return;
    e.preventDefault(); t.tabIndex = -1; next.tabIndex = 0; next.focus();
  });

  // Plots: the values of every line at the x under the pointer.
  const number = v => !isFinite(v) ? "n/a" : v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6)
    ? v.toExponential(2) : String(+v.toPrecision(4));
  for (const svg of document.querySelectorAll("svg[data-area]")) {
    const [left, top, width, height] = svg.dataset.area.split(" ").map(Number);
    const [x0, x1, y0, y1] = svg.dataset.range.split(" ").map(Number);
    const lines = [...svg.querySelectorAll(".series")].map(g => [g.dataset.name,
      [...g.querySelectorAll("polyline:not(.raw)")].flatMap(p => [...p.points])]);
    const cross = document.createElementNS(svg.namespaceURI, "line");
    cross.setAttribute("class", "cross"); cross.setAttribute("y1", top); cross.setAttribute("y2", top + height);
    svg.addEventListener("pointermove", e => {
      const box = svg.getBoundingClientRect(), unit = svg.viewBox.baseVal.width / box.width;
      const px = (e.clientX - box.left) * unit;
      if (px < left - 4 || px > left + width + 4) { cross.remove(); return hide(); }
      let best = null;
      const near = lines.map(([name, points]) => {
        let hit = null;
        for (const p of points) if (!hit || Math.abs(p.x - px) < Math.abs(hit.x - px)) hit = p;
        if (hit && (!best || Math.abs(hit.x - px) < Math.abs(best.x - px))) best = hit;
        return [name, hit];
      });
      if (!best) return;
      cross.setAttribute("x1", best.x); cross.setAttribute("x2", best.x); svg.append(cross);
      // A place in the picture is known to a tenth of a unit, and x to no more digits than that.
      const step = (x1 - x0) / width, digit = 10 ** Math.ceil(Math.log10(step / 10));
      const at = p => number(Math.round((x0 + (p.x - left) * step) / digit) * digit);
      const rows = [[svg.dataset.x, at(best)]];
      for (const [name, p] of near) if (p)
        rows.push([name + (Math.abs(p.x - best.x) < 4 ? "" : " (at " + at(p) + ")"), number(y1 - (p.y - top) / height * (y1 - y0))]);
      show(rows, { left: e.clientX + 14, top: e.clientY - 6, bottom: e.clientY + 10 });
    });
    svg.addEventListener("pointerleave", () => { cross.remove(); hide(); });
  }

  // Tables: a click on a column's head sorts by it, a second click turns the order around.
  for (const button of document.querySelectorAll("th>button")) button.addEventListener("click", () => {
    const th = button.parentNode, table = th.closest("table"), column = th.cellIndex;
    const down = th.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0], key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const [s, t] = [key(a), key(b)], d = s - t;
      return Number.isNaN(d) ? s.localeCompare(t) : d;
    });
    body.append(...(down ? rows.reverse() : rows));
  });
})();

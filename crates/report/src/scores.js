"use strict";
(() => {
  // Text from the data only ever enters the page through textContent.
  const { beta, limit, words, rows } = JSON.parse(document.getElementById("data").textContent);
  const LEVELS = 6, MINUS = "\u2212";
  const make = (tag, name, text) => {
    const e = document.createElement(tag);
    if (name) e.className = name;
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const fixed = (x, digits = 3) => x === null || x === undefined ? "" :
    (Math.abs(x) > 0 && Math.abs(x) < 5e-4 ? x.toExponential(2) : x.toFixed(digits)).replaceAll("-", MINUS);
  const signed = x => x === null || x === undefined ? "" : (x > 0 ? "+" : "") + fixed(x);
  const reward = (a, b) => a === null ? null : beta * (a - b);
  const colour = r => {
    if (r === null) return "na";
    const level = Math.round(Math.max(-1, Math.min(1, r / limit)) * LEVELS);
    return level === 0 ? "z" : level > 0 ? "p" + level : "n" + -level;
  };

  // What would be invisible, or would turn the writing direction around, gets a sign.
  const odd = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]/g;
  const sign = c => c === "\n" ? "\u23ce" : c === "\t" ? "\u21e5" : c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0))
    : "U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
  const fill = (span, text) => {
    if (text === "") { span.append(make("i", "mark", "\u2205")); return; }
    let from = 0;
    for (const hit of text.matchAll(odd)) {
      span.append(text.slice(from, hit.index), make("i", "mark", sign(hit[0])));
      if (hit[0] === "\n" || hit[0] === "\t") span.append(hit[0]);
      from = hit.index + 1;
    }
    span.append(text.slice(from));
  };

  const tip = (c, t, before) => {
    if (c.a[t] === null) return [["token", JSON.stringify(c.t[t])], ["id", String(c.i[t])], ["", "not scored"]];
    const r = reward(c.a[t], c.b[t]);
    const out = [["token", JSON.stringify(c.t[t])], ["id", String(c.i[t])],
      ["policy log p (nats)", fixed(c.a[t])], ["reference log p (nats)", fixed(c.b[t])],
      ["implicit reward", signed(r)], ["sum so far", signed(before + r)],
      ["entropy of the policy (nats)", fixed(c.e[t])], ["KL from the reference (nats)", fixed(c.k[t])]];
    if (!c.x[t].length) return out;
    const table = make("table"), head = make("tr");
    for (const name of ["instead", "policy p", "reference p", "reward"]) head.append(make("th", "", name));
    table.append(head);
    for (let k = 0; k < c.x[t].length; k += 3) {
      const [id, a, b] = c.x[t].slice(k, k + 3), line = make("tr", id === c.i[t] ? "here" : "");
      line.append(make("td", "", JSON.stringify(words[id] ?? "")), make("td", "num", Math.exp(a).toFixed(3)),
        make("td", "num", Math.exp(b).toFixed(3)), make("td", "num", signed(reward(a, b))));
      table.append(line);
    }
    out.push(table);
    return out;
  };

  // The sums of both completions over their tokens, on one scale.
  const SVG = "http://www.w3.org/2000/svg";
  const sums = row => {
    const lines = row.c.map(c => { let s = 0; return [0, ...c.a.map((a, t) => s += reward(a, c.b[t]) ?? 0)]; });
    const all = lines.flat(), low = Math.min(...all), high = Math.max(...all), n = Math.max(...lines.map(l => l.length - 1), 1);
    const y = v => high === low ? 20 : 38 - 36 * (v - low) / (high - low);
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 400 40"); svg.setAttribute("preserveAspectRatio", "none"); svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "sum of implicit rewards up to each token");
    const path = (name, d) => { const p = document.createElementNS(SVG, "path"); p.setAttribute("class", name); p.setAttribute("d", d); svg.append(p); };
    path("zero", `M0 ${y(0)}H400`);
    lines.forEach((l, i) => path("c" + i, "M" + l.map((v, t) => `${(400 * t / n).toFixed(1)} ${y(v).toFixed(2)}`).join("L")));
    const figure = make("figure");
    figure.append(svg, make("figcaption", "", `sum of rewards up to each token, ${signed(low) || "0"} to ${signed(high) || "0"}`
      + (row.c.length > 1 ? `; solid: ${row.c[0].l}, dashed: ${row.c[1].l}` : "")));
    return figure;
  };

  const margin = row => row.c.length > 1 ? row.c[0].s - row.c[1].s : row.c[0].s;
  const paired = rows.some(row => row.c.length > 1);
  const draw = (row, article) => {
    const body = make("div", "body");
    body.append(make("div", "prompt", row.p));
    const pair = make("div", "pair");
    for (const c of row.c) {
      const side = make("div"), name = make("div", "name");
      name.append(make("b", "", c.l), ` reward ${signed(c.s)}, ${c.t.length} token${c.t.length === 1 ? "" : "s"}`);
      const line = make("div", "tokens");
      line.setAttribute("role", "group"); line.setAttribute("aria-label", c.l + ": implicit reward of each token");
      let before = 0;
      c.t.forEach((text, t) => {
        const r = reward(c.a[t], c.b[t]), span = make("span", colour(r) + (c.d[t] === "1" ? " diff" : "")), here = before;
        span.tabIndex = t === 0 ? 0 : -1;
        span.readout = () => tip(c, t, here);
        fill(span, text);
        line.append(span);
        before += r ?? 0;
      });
      side.append(name, line);
      pair.append(side);
    }
    body.append(pair, sums(row));
    article.append(body);
  };

  const main = document.getElementById("rows");
  const drawn = new IntersectionObserver(entries => {
    for (const e of entries) if (e.isIntersecting) { drawn.unobserve(e.target); draw(e.target.row, e.target); }
  }, { rootMargin: "1200px 0px" });
  const articles = rows.map((row, index) => {
    const article = make("article", "row"), head = make("header"), m = margin(row);
    article.row = row; article.index = index; article.margin = m;
    head.append(make("h2", "", row.n), make("span", "margin" + (paired && m <= 0 ? " wrong" : ""),
      (paired ? "margin " : "reward ") + signed(m) + (paired && m < 0 ? " \u25bc rejected ahead" : paired && m === 0 ? " tied" : "")));
    article.append(head);
    return article;
  });

  const [sort, show, find, marks, count] = ["sort", "show", "find", "marks", "count"].map(id => document.getElementById(id));
  const orders = { file: (a, b) => a.index - b.index, up: (a, b) => a.margin - b.margin,
    down: (a, b) => b.margin - a.margin, size: (a, b) => Math.abs(b.margin) - Math.abs(a.margin) };
  if (!paired) { show.closest("label").hidden = true; marks.closest("label").hidden = true; }
  const text = row => row.p + "\n" + row.c.map(c => c.t.join("")).join("\n");
  const arrange = () => {
    const wanted = find.value.toLowerCase();
    const kept = articles.filter(a => (show.value === "all" || (a.margin > 0) === (show.value === "right"))
      && (wanted === "" || text(a.row).toLowerCase().includes(wanted))).sort(orders[sort.value]);
    main.replaceChildren(...kept);
    count.textContent = kept.length === rows.length ? `${rows.length} rows` : `${kept.length} of ${rows.length} rows`;
    for (const a of kept) if (!a.querySelector(".body")) drawn.observe(a);
  };
  for (const control of [sort, show]) control.addEventListener("change", arrange);
  find.addEventListener("input", arrange);
  const mark = () => main.classList.toggle("marks", marks.checked);
  marks.addEventListener("change", mark);
  // A printed page has no window to come near to.
  addEventListener("beforeprint", () => { for (const a of main.children) if (!a.querySelector(".body")) { drawn.unobserve(a); draw(a.row, a); } });
  mark();
  arrange();
})();

"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, css, text) => {
    const node = document.createElement(tag);
    if (css) node.className = css;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const signed = (x, digits = 3) =>
    (x > 0 ? "+" : "") + x.toFixed(digits).replace("-", "−").replace(/^\+(0\.0+)$/, "$1");
  const plain = (x, digits = 3) => x.toFixed(digits).replace("-", "−");

  // ---- which token earned what -------------------------------------------------------------------------
  const NAMES = { logprob: "log π", logprob_ref: "log π̄", kl: "KL(π‖π̄)", q: "Q", v: "V",
    moved: "Q − V", advantage: "y − V", share: "share of the change" };

  function creditView(data) {
    const view = { tenth: data.tenths.length - 1, program: null, token: 0, pinned: null };
    const tokens = $("tokens"), numbers = $("numbers"), which = $("which"), column = $("column");
    for (const tenth of data.tenths)
      for (const p of tenth.programs) if (p.q) p.moved = p.q.map((q, k) => q - p.v[k]);

    const values = () => view.program[column.value];
    const counted = (p, k) => p.lines.every((line) => line === null) || p.lines[k] !== null;

    function mostBlamed(p, column_of) {
      let at = -1;
      column_of.forEach((x, k) => { if (counted(p, k) && (at < 0 || x < column_of[at])) at = k; });
      return at >= 0 && column_of[at] < 0 ? at : -1;
    }

    function sharedStart(a, b) {
      let k = 0;
      while (k < a.texts.length && k < b.texts.length && a.texts[k] === b.texts[k]) k++;
      return k;
    }

    function choose() {
      const tenth = data.tenths[view.tenth];
      const wanted = which.value;
      which.replaceChildren(...tenth.programs.map((p) => {
        const option = make("option", "", `${p.why}: ${plain(p.reward)}`);
        option.value = p.why;
        return option;
      }));
      let next = tenth.programs.find((p) => p.why === wanted);
      if ($("follow").checked && view.pinned)
        next = tenth.programs.reduce((a, b) =>
          sharedStart(b, view.pinned) > sharedStart(a, view.pinned) ? b : a);
      view.program = next || tenth.programs[Math.min(1, tenth.programs.length - 1)];
      which.value = view.program.why;
      const said = `programs ${tenth.first.toLocaleString("en")} to ${tenth.last.toLocaleString("en")}`;
      $("tenth-label").textContent = said;
      $("tenth").setAttribute("aria-valuetext", said);
      draw();
    }

    function draw() {
      const p = view.program, xs = values() || [];
      const inside = xs.filter((_, k) => counted(p, k)).map(Math.abs);
      const scale = Math.max(1e-9, ...inside);
      const blamed = p.reward < 0 || p.error ? mostBlamed(p, xs) : -1;
      const shared = $("follow").checked && view.pinned && view.pinned !== p ? sharedStart(p, view.pinned) : 0;
      tokens.replaceChildren();
      let row, no = 0;
      const begin = () => {
        no += 1;
        row = make("div", "row");
        row.setAttribute("role", "none");
        const label = make("span", "no", String(no));
        label.setAttribute("aria-hidden", "true");
        row.append(label);
        tokens.append(row);
        const source = make("span", "source");
        row.append(source);
        row = source;
      };
      begin();
      const first_line = p.lines.findIndex((line) => line !== null);
      const shift = first_line < 0 ? 0 : p.lines[first_line] - lineAt(p, first_line);
      p.texts.forEach((text, k) => {
        const parts = (text === "" ? ["end"] : [text]).flatMap((t) => t.split(/(\n)/)).filter((t) => t !== "");
        let named = false;
        parts.forEach((part, i) => {
          if (part === "\n") { begin(); return; }
          const node = make("span", "tok", part);
          node.dataset.k = k;
          if (text === "") node.classList.add("end");
          if (part.trim()) {
            if (xs.length) node.style.background =
              `rgba(var(--${xs[k] < 0 ? "blame" : "credit"}), ${(0.6 * Math.min(1, Math.abs(xs[k]) / scale)).toFixed(3)})`;
            if (k === blamed) node.classList.add("blamed");
            if (k < shared) node.classList.add("shared");
          }
          if (!named && (part.trim() || i === parts.length - 1)) {
            named = true;
            node.id = `token-${k}`;
            node.setAttribute("role", "option");
            node.setAttribute("aria-selected", "false");
            const spoken = text === "" ? "end" : text.trim() || "blank";
            node.setAttribute("aria-label", xs.length ? `${spoken}, ${signed(xs[k])}` : spoken);
          }
          row.append(node);
        });
      });
      if (p.line !== null) {
        const target = tokens.children[p.line - 1 - shift];
        if (target) {
          target.classList.add("named");
          const on = blamed >= 0 && p.lines[blamed] === p.line;
          const where = blamed < 0 ? "" : on ? " · the most blamed token stands on this line"
            : ` · the most blamed token stands on line ${p.lines[blamed]}`;
          const said = make("div", "said", `▲ interpreter: ${p.error.replace(/^line \d+: /, "")}${where}`);
          said.setAttribute("role", "none");
          target.after(said);
        }
      }
      const outcome = p.error ? "failed" : "ran";
      $("credit-head").textContent =
        `Program ${p.step.toLocaleString("en")} · ${p.why} · ${outcome}, reward ${plain(p.reward)}` +
        (p.t ? ` · try ${p.t + 1} of its episode` : "") + (p.error && p.line === null ? ` · ${p.error}` : "");
      $("scale-low").textContent = `blame ${signed(-scale, 2)}`;
      $("scale-high").textContent = `${signed(scale, 2)} credit`;
      const weight = (k) => (counted(p, k) ? Math.abs(xs[k] ?? 0) : -1);
      const largest = p.texts.reduce((at, _, k) => (weight(k) > weight(at) ? k : at), 0);
      view.token = blamed >= 0 ? blamed : largest;
      drawValues();
      show(view.token, false);
    }

    function lineAt(p, k) {
      return 1 + (p.texts.slice(0, k).join("") + p.texts[k].match(/^\s*/)[0]).split("\n").length - 1;
    }

    function show(k, scroll = true) {
      const p = view.program;
      view.token = k;
      for (const node of tokens.querySelectorAll(".on")) node.classList.remove("on");
      for (const node of tokens.querySelectorAll('[aria-selected="true"]')) node.setAttribute("aria-selected", "false");
      for (const node of tokens.querySelectorAll(`[data-k="${k}"]`)) if (node.textContent.trim()) node.classList.add("on");
      const named = $(`token-${k}`);
      if (named) {
        named.setAttribute("aria-selected", "true");
        tokens.setAttribute("aria-activedescendant", named.id);
        if (scroll) named.scrollIntoView({ block: "nearest", inline: "nearest" });
      }
      const rows = [["token", p.texts[k] === "" ? "end of the program" : p.texts[k].trim() || JSON.stringify(p.texts[k])]];
      rows.push(["place", `${k + 1} of ${p.texts.length}`]);
      for (const name of ["moved", "advantage", "q", "v", "logprob", "logprob_ref", "kl"]) {
        if (!p[name] || p[name][k] === null) continue;
        const text = ["moved", "advantage"].includes(name) ? signed(p[name][k]) : plain(p[name][k]);
        rows.push([name === "advantage" ? data.advantage : NAMES[name], text]);
      }
      if (p.moved) {
        const total = p.moved.reduce((sum, x) => sum + Math.abs(x), 0) || 1;
        rows.push([NAMES.share, `${Math.round(100 * Math.abs(p.moved[k]) / total)} %`]);
      }
      numbers.replaceChildren(...rows.flatMap(([name, text], i) => {
        const css = i === 0 ? "whole" : "";
        return i === 0 ? [make("dd", css, text)] : [make("dt", css, name), make("dd", css, text)];
      }));
      if (numbers.firstChild) {
        const dt = make("dt", "whole soft", "token");
        numbers.prepend(dt);
      }
      const cursor = $("values").querySelector(".cursor");
      if (cursor && p.v) cursor.setAttribute("transform", `translate(${x_of(k)} 0)`);
    }

    const W = 1000, H = 130, PAD = 8;
    const x_of = (k) => 46 + (k + 0.5) * (W - 60) / view.program.texts.length;

    function drawValues() {
      const svg = $("values"), p = view.program;
      svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
      svg.setAttribute("preserveAspectRatio", "none");
      svg.replaceChildren();
      svg.parentElement.hidden = !p.v;
      if (!p.v) return;
      const ends = [...p.v, p.reward, 0];
      const low = Math.min(...ends), high = Math.max(...ends);
      const y_of = (y) => H - PAD - (y - low) / (high - low || 1) * (H - 2 * PAD);
      const add = (tag, attributes, text) => {
        const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
        for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
        if (text) node.textContent = text;
        svg.append(node);
      };
      add("line", { class: "grid", x1: 46, x2: W, y1: y_of(0), y2: y_of(0) });
      const step = (W - 60) / p.v.length;
      let path = "";
      p.v.forEach((v, k) => { path += `${k ? "L" : "M"}${46 + k * step},${y_of(v)}L${46 + (k + 1) * step},${y_of(v)}`; });
      add("path", { class: "line a", d: path, "vector-effect": "non-scaling-stroke" });
      add("line", { class: "bound", x1: 46, x2: W, y1: y_of(p.reward), y2: y_of(p.reward), "vector-effect": "non-scaling-stroke" });
      add("line", { class: "axis cursor", x1: 0, x2: 0, y1: 0, y2: H, "vector-effect": "non-scaling-stroke" });
      $("values-caption").textContent = `V along the program, token by token, from ${plain(p.v[0], 2)} at its start ` +
        `to ${plain(p.v[p.v.length - 1], 2)} before its last token; dashed: the reward, ${plain(p.reward, 2)}; ` +
        "upright: the token that is chosen.";
      svg.setAttribute("aria-label", $("values-caption").textContent);
    }

    const at = (event) => event.target.closest("[data-k]");
    tokens.addEventListener("mouseover", (e) => { const node = at(e); if (node) show(Number(node.dataset.k), false); });
    tokens.addEventListener("click", (e) => { const node = at(e); if (node) show(Number(node.dataset.k)); });
    tokens.addEventListener("keydown", (e) => {
      const n = view.program.texts.length;
      const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -n, End: n };
      if (e.key === "ArrowDown" || e.key === "ArrowUp") {
        const p = view.program, here = lineAt(p, view.token), down = e.key === "ArrowDown";
        const rows = p.texts.map((_, k) => lineAt(p, k));
        const next = down ? rows.findIndex((line) => line > here) : rows.findIndex((line) => line === here - 1);
        if (next >= 0) show(next);
      } else if (e.key in moves) show(Math.max(0, Math.min(n - 1, view.token + moves[e.key])));
      else return;
      e.preventDefault();
    });
    $("tenth").addEventListener("input", () => { view.tenth = Number($("tenth").value); choose(); });
    which.addEventListener("change", () => { if ($("follow").checked) $("follow").checked = false; choose(); });
    column.addEventListener("change", draw);
    $("follow").addEventListener("change", () => { view.pinned = $("follow").checked ? view.program : null; draw(); });
    data.tenths.forEach((tenth, i) => { if (tenth.programs.some((p) => p.line !== null)) view.tenth = i; });
    $("tenth").value = view.tenth;
    which.append(new Option("worst", "worst"));
    which.value = "worst";
    choose();
  }

  // ---- all programs ------------------------------------------------------------------------------------
  const PAGE = 50;

  function programTable(data) {
    const n = data.step.length, body = $("all").tBodies[0];
    const lower = data.text.map((text, i) => (text + "\n" + (data.error[i] || "")).toLowerCase());
    for (const [id, names] of [["f-outcome", data.outcomes], ["f-kind", data.kinds]])
      for (const name of names) $(id).append(new Option(name, name));
    let matches = [], shown = 0;

    function filter() {
      const number = (id) => ($(id).value === "" ? null : Number($(id).value));
      const outcome = data.outcomes.indexOf($("f-outcome").value), kind = data.kinds.indexOf($("f-kind").value);
      const low = number("f-low"), high = number("f-high"), text = $("f-text").value.toLowerCase();
      matches = [];
      for (let i = 0; i < n; i++)
        if ((outcome < 0 || data.outcome[i] === outcome) && (kind < 0 || data.kind[i] === kind) &&
            (low === null || data.reward[i] >= low) && (high === null || data.reward[i] <= high) &&
            (text === "" || lower[i].includes(text))) matches.push(i);
      const order = $("f-sort").value, by = data[order.replace("-", "")], sign = order[0] === "-" ? -1 : 1;
      if (order !== "step") matches.sort((i, j) => sign * (by[i] - by[j]) || i - j);
      $("f-count").textContent = `${matches.length.toLocaleString("en")} of ${n.toLocaleString("en")} programs`;
      body.replaceChildren();
      shown = 0;
      more();
    }

    function more() {
      for (const i of matches.slice(shown, shown + PAGE)) body.append(line(i));
      shown = Math.min(matches.length, shown + PAGE);
      $("f-more").hidden = shown >= matches.length;
    }

    function line(i) {
      const row = make("tr", "main");
      const head = make("th"), button = make("button", "", data.step[i].toLocaleString("en"));
      head.scope = "row";
      button.type = "button";
      button.setAttribute("aria-expanded", "false");
      button.setAttribute("aria-label", `Program ${data.step[i]}: show its source`);
      head.append(button);
      const outcome = data.outcome[i] < 0 ? "" : data.outcomes[data.outcome[i]];
      row.append(head, make("td", "", plain(data.reward[i])), make("td", "l", outcome),
        make("td", data.error[i] ? "l error" : "l", data.error[i] || data.family[i] || firstLine(data.text[i])));
      row.addEventListener("click", () => {
        const open = button.getAttribute("aria-expanded") === "true";
        button.setAttribute("aria-expanded", String(!open));
        if (open) { row.nextSibling.remove(); return; }
        const detail = make("tr"), cell = make("td", "l"), pre = make("pre", "code"), code = make("code");
        cell.colSpan = 4;
        pre.tabIndex = 0;
        code.append(...highlighted(data.text[i]));
        pre.append(code);
        cell.append(pre);
        detail.append(cell);
        row.after(detail);
      });
      return row;
    }

    const firstLine = (text) => text.trim().split("\n")[0].slice(0, 120);
    for (const id of ["f-outcome", "f-kind", "f-sort"]) $(id).addEventListener("change", filter);
    for (const id of ["f-low", "f-high", "f-text"]) $(id).addEventListener("input", filter);
    $("f-more").addEventListener("click", more);
    filter();
  }

  const SYNTAX = new RegExp([
    /(?<c>#[^\n]*)/, /(?<s>'''[\s\S]*?'''|"""[\s\S]*?"""|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*")/,
    /(?<k>\b(?:and|as|assert|break|class|continue|def|del|elif|else|except|False|finally|for|from|if|import|in|is|lambda|None|not|or|pass|raise|return|True|try|while|with|yield)\b)/,
    /(?<m>\b\d[\w.]*)/, /(?<f>\b[A-Z]\w*(?=\())/,
  ].map((part) => part.source).join("|"), "g");

  function highlighted(source) {
    const parts = [];
    let at = 0;
    for (const match of source.matchAll(SYNTAX)) {
      const kind = Object.keys(match.groups).find((name) => match.groups[name] !== undefined);
      parts.push(source.slice(at, match.index), make("span", `s-${kind}`, match[0]));
      at = match.index + match[0].length;
    }
    parts.push(source.slice(at));
    return parts;
  }

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
  }

  // ---- a page that follows a run -----------------------------------------------------------------------
  async function follow(version) {
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, 2000));
      try {
        const now = await (await fetch("/version")).text();
        if (now !== version) {
          sessionStorage.setItem("scroll", String(scrollY));
          location.reload();
          return;
        }
      } catch { /* the run's server is gone; the page stays as it is */ }
    }
  }

  const start = async () => {
    if ($("credit-data")) creditView(JSON.parse($("credit-data").textContent));
    if ($("programs-data")) programTable(await unpack($("programs-data").textContent));
    if (document.body.dataset.live) {
      const at = sessionStorage.getItem("scroll");
      if (at) scrollTo({ top: Number(at), behavior: "instant" });
      follow(document.body.dataset.live);
    }
    document.body.dataset.ready = "true";
  };
  start();
})();

/* What the live figures share: small linear algebra, plots in SVG, controls that work by
   keyboard. A classic script, so that it runs from a disk; loading it twice is harmless. */
(function () {
  "use strict";
  if (window.crateLive) return;
  const SVG = "http://www.w3.org/2000/svg";
  const definitions = {}, started = [], waiting = new WeakSet();

  /* ---- linear algebra: a matrix is an array of rows ---- */

  const zeros = (m, n) => Array.from({ length: m }, () => new Array(n).fill(0));
  const transpose = A => A[0].map((_, j) => A.map(row => row[j]));
  const dot = (a, b) => { let s = 0; for (let i = 0; i < a.length; i++) s += a[i] * b[i]; return s; };
  const norm = a => Math.sqrt(dot(a, a));
  const add = (a, b, scale = 1) => a.map((x, i) => x + scale * b[i]);
  function matmul(A, B) {
    const out = zeros(A.length, B[0].length);
    for (let i = 0; i < A.length; i++) {
      for (let k = 0; k < B.length; k++) {
        const a = A[i][k], row = B[k], into = out[i];
        if (a !== 0) for (let j = 0; j < row.length; j++) into[j] += a * row[j];
      }
    }
    return out;
  }
  /* I + weight V^T V for rows V (n x p) */
  function gramPlusIdentity(V, weight) {
    const p = V[0].length, G = zeros(p, p);
    for (const v of V) {
      for (let i = 0; i < p; i++) for (let j = 0; j < p; j++) G[i][j] += weight * v[i] * v[j];
    }
    for (let i = 0; i < p; i++) G[i][i] += 1;
    return G;
  }
  function cholesky(A) {
    const n = A.length, L = zeros(n, n);
    for (let i = 0; i < n; i++) {
      for (let j = 0; j <= i; j++) {
        let s = A[i][j];
        for (let k = 0; k < j; k++) s -= L[i][k] * L[j][k];
        L[i][j] = i === j ? Math.sqrt(s) : s / L[j][j];
      }
    }
    return L;
  }
  /* x with (L L^T) x = b */
  function choleskySolve(L, b) {
    const n = L.length, x = b.slice();
    for (let i = 0; i < n; i++) {
      for (let k = 0; k < i; k++) x[i] -= L[i][k] * x[k];
      x[i] /= L[i][i];
    }
    for (let i = n - 1; i >= 0; i--) {
      for (let k = i + 1; k < n; k++) x[i] -= L[k][i] * x[k];
      x[i] /= L[i][i];
    }
    return x;
  }
  /* Singular value decomposition A = U diag(s) V^T by one-sided Jacobi; columns of A
     not more than rows. Returns rows of U^T, s (not sorted) and rows of V^T. */
  function svd(A) {
    const U = transpose(A), n = U.length;
    const V = zeros(n, n);
    for (let i = 0; i < n; i++) V[i][i] = 1;
    const rotate = (M, i, j, c, s) => {
      const a = M[i], b = M[j];
      for (let k = 0; k < a.length; k++) {
        const x = a[k], y = b[k];
        a[k] = c * x - s * y;
        b[k] = s * x + c * y;
      }
    };
    for (let sweep = 0; sweep < 60; sweep++) {
      let off = 0;
      for (let i = 0; i < n - 1; i++) {
        for (let j = i + 1; j < n; j++) {
          const aa = dot(U[i], U[i]), bb = dot(U[j], U[j]), ab = dot(U[i], U[j]);
          if (Math.abs(ab) <= 1e-15 * Math.sqrt(aa * bb) || ab === 0) continue;
          off = Math.max(off, Math.abs(ab) / Math.sqrt(aa * bb));
          const zeta = (bb - aa) / (2 * ab);
          const t = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.hypot(1, zeta));
          const c = 1 / Math.hypot(1, t);
          rotate(U, i, j, c, c * t);
          rotate(V, i, j, c, c * t);
        }
      }
      if (off < 1e-15) break;
    }
    const s = U.map(norm);
    return { u: U.map((row, i) => row.map(x => (s[i] > 0 ? x / s[i] : 0))), s, v: V };
  }
  function softmax(row) {
    const top = Math.max(...row), e = row.map(x => Math.exp(x - top));
    const sum = e.reduce((a, b) => a + b, 0);
    return e.map(x => x / sum);
  }
  const cosine = (a, b) => dot(a, b) / (norm(a) * norm(b));
  const mean = a => a.reduce((s, x) => s + x, 0) / a.length;
  const algebra = { zeros, transpose, dot, norm, add, matmul, gramPlusIdentity, cholesky,
    choleskySolve, svd, softmax, cosine, mean };

  /* ---- elements ---- */

  function html(tag, attributes, ...children) {
    const e = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key in e && key !== "list" && key !== "form") e[key] = value;
      else e.setAttribute(key, value);
    }
    e.append(...children);
    return e;
  }
  function svg(tag, attributes, parent, text) {
    const e = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes || {})) e.setAttribute(key, value);
    if (text !== undefined) e.textContent = text;
    if (parent) parent.appendChild(e);
    return e;
  }
  /* a colour of the style sheet as numbers, for canvases */
  function rgb(element, name) {
    const hex = getComputedStyle(element).getPropertyValue(`--live-${name}`).trim();
    return [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
  }
  const colour = name => `var(--live-${name})`;
  function say(x, digits = 2) {
    if (x === 0) return "0";
    if (!isFinite(x)) return String(x);
    const size = Math.abs(x);
    const text = size < 1e-3 || size >= 1e5 ? x.toExponential(digits - 1) :
      Number(x.toPrecision(digits)).toString();
    return text.replace("-", "\u2212");
  }
  const fixed = (x, digits = 2) => x.toFixed(digits).replace("-", "\u2212");

  /* ---- a panel: axes of one plot inside the figure's SVG ---- */

  let clips = 0;
  function ticksOf(low, high, log, wanted) {
    if (log) {
      const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
      const every = Math.max(1, Math.ceil((last - first + 1) / wanted)), ticks = [];
      for (let k = first; k <= last; k += every) ticks.push(Math.pow(10, k));
      return ticks;
    }
    const rough = (high - low) / wanted, ten = Math.pow(10, Math.floor(Math.log10(rough)));
    const step = [1, 2, 5, 10].map(m => m * ten).find(s => s >= rough * 0.999);
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) {
      ticks.push(Number((k * step).toPrecision(12)));
    }
    return ticks;
  }
  function makePanel(parent, box, options) {
    const o = Object.assign({ x: [0, 1], y: [0, 1] }, options);
    const left = o.bare ? 4 : o.noYTicks ? 8 : o.ylabel ? 54 : 42;
    const top = o.title ? 22 : 8, bottom = o.bare ? 4 : o.xlabel ? 40 : 24;
    const area = { x: box.x + left, y: box.y + top, w: box.w - left - 10, h: box.h - top - bottom };
    let [x0, x1] = o.x, [y0, y1] = o.y;
    if (o.equal) {  // one unit is equally long on both axes: the area shrinks to that
      const unit = Math.min(area.w / Math.abs(x1 - x0), area.h / Math.abs(y1 - y0));
      const w = unit * Math.abs(x1 - x0), h = unit * Math.abs(y1 - y0);
      if (o.wide) {  // or it stays, and shows more of the plane
        const cx = (x0 + x1) / 2, cy = (y0 + y1) / 2;
        [x0, x1] = [cx - area.w / unit / 2, cx + area.w / unit / 2];
        [y0, y1] = [cy - area.h / unit / 2, cy + area.h / unit / 2];
      } else Object.assign(area, { x: area.x + (area.w - w) / 2, w, h });
    }
    const part = (v, a, b, log) => log ? Math.log(v / a) / Math.log(b / a) : (v - a) / (b - a);
    const X = v => area.x + area.w * part(v, x0, x1, o.logx);
    const Y = v => area.y + area.h * (1 - part(v, y0, y1, o.logy));
    const back = (t, a, b, log) => log ? a * Math.pow(b / a, t) : a + t * (b - a);
    const group = svg("g", {}, parent);
    const frame = svg("g", { "class": "live-axes" }, group);
    if (!o.bare) {
      for (const t of o.noXTicks ? [] : o.xticks || ticksOf(x0, x1, o.logx, area.w / 60)) {
        const at = Array.isArray(t) ? t[0] : t, name = Array.isArray(t) ? t[1] : say(t, 3);
        if (!o.noGrid) svg("line", { x1: X(at), x2: X(at), y1: area.y, y2: area.y + area.h }, frame);
        svg("text", { x: X(at), y: area.y + area.h + 15, "text-anchor": "middle" }, frame, name);
      }
      for (const t of o.noYTicks ? [] : o.yticks || ticksOf(y0, y1, o.logy, area.h / 45)) {
        const at = Array.isArray(t) ? t[0] : t, name = Array.isArray(t) ? t[1] : say(t, 3);
        if (!o.noGrid) svg("line", { x1: area.x, x2: area.x + area.w, y1: Y(at), y2: Y(at) }, frame);
        svg("text", { x: area.x - 5, y: Y(at) + 4, "text-anchor": "end" }, frame, name);
      }
      svg("rect", { x: area.x, y: area.y, width: area.w, height: area.h, "class": "live-frame" }, frame);
    }
    if (o.xlabel) {
      svg("text", { x: area.x + area.w / 2, y: area.y + area.h + 33, "text-anchor": "middle",
        "class": "live-label" }, group, o.xlabel);
    }
    if (o.ylabel) {
      const at = { x: box.x + 13, y: area.y + area.h / 2 };
      svg("text", { x: at.x, y: at.y, "text-anchor": "middle", "class": "live-label",
        transform: `rotate(-90 ${at.x} ${at.y})` }, group, o.ylabel);
    }
    if (o.title) {
      svg("text", { x: Math.min(area.x, box.x + left), y: box.y + 15, "class": "live-title" }, group, o.title);
    }
    const id = `live-clip-${++clips}`;
    svg("rect", { x: area.x - 1, y: area.y - 1, width: area.w + 2, height: area.h + 2 },
      svg("clipPath", { id }, group));
    const inside = svg("g", { "clip-path": `url(#${id})` }, group);
    const style = (name, extra) => Object.assign({ stroke: colour(name), fill: "none" }, extra);
    const place = (canvas, xs, ys, extra) => svg("image", Object.assign({
      href: canvas.toDataURL(), x: Math.min(X(xs[0]), X(xs[1])), y: Math.min(Y(ys[0]), Y(ys[1])),
      width: Math.abs(X(xs[1]) - X(xs[0])), height: Math.abs(Y(ys[1]) - Y(ys[0])),
      preserveAspectRatio: "none", style: "image-rendering: pixelated" }, extra), inside);
    const panel = {
      area, X, Y, inside, group,
      toData: (px, py) => [back((px - area.x) / area.w, x0, x1, o.logx),
        back(1 - (py - area.y) / area.h, y0, y1, o.logy)],
      contains: (px, py) => px >= area.x && px <= area.x + area.w && py >= area.y && py <= area.y + area.h,
      line(points, name, extra) {
        const shown = points.filter(p => isFinite(p[0]) && isFinite(p[1]));
        return svg("polyline", style(name, Object.assign({ "stroke-width": 2,
          points: shown.map(p => `${X(p[0]).toFixed(2)},${Y(p[1]).toFixed(2)}`).join(" ") }, extra)), inside);
      },
      arrow(from, to, name, extra) {
        const a = [X(from[0]), Y(from[1])], b = [X(to[0]), Y(to[1])];
        const length = Math.hypot(b[0] - a[0], b[1] - a[1]);
        const g = svg("g", style(name, Object.assign({ "stroke-width": 2 }, extra)), inside);
        svg("line", { x1: a[0], y1: a[1], x2: b[0], y2: b[1] }, g);
        if (length > 3) {
          const u = [(b[0] - a[0]) / length, (b[1] - a[1]) / length], h = Math.min(7, 0.6 * length);
          const side = s => `${b[0] - h * u[0] + s * 0.5 * h * u[1]},${b[1] - h * u[1] - s * 0.5 * h * u[0]}`;
          svg("polyline", { points: `${side(1)} ${b[0]},${b[1]} ${side(-1)}`,
            "stroke-dasharray": "none" }, g);
        }
        return g;
      },
      /* shapes 0..3: circle, square, triangle, diamond, so that classes read in grey */
      dot(point, name, shape = 0, extra = {}) {
        const x = X(point[0]), y = Y(point[1]), r = extra.r || 4.5;
        const e = Object.assign({ fill: colour(name), stroke: "none" }, extra);
        delete e.r;
        if (shape % 4 === 0) return svg("circle", Object.assign({ cx: x, cy: y, r }, e), inside);
        const corners = [null, [[-1, -1], [1, -1], [1, 1], [-1, 1]], [[0, -1.2], [1.1, 0.8], [-1.1, 0.8]],
          [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]]][shape % 4];
        return svg("polygon", Object.assign({ points: corners.map(
          c => `${x + r * 0.9 * c[0]},${y + r * 0.9 * c[1]}`).join(" ") }, e), inside);
      },
      bar(x, low, high, width, name, extra) {
        const a = Y(low), b = Y(high);
        return svg("rect", Object.assign({ x: X(x) - width / 2, width, y: Math.min(a, b),
          height: Math.abs(a - b), fill: colour(name) }, extra), inside);
      },
      /* a matrix of shares in [0, 1], first row on top, as a picture; ink: a colour's name */
      image(matrix, xs, ys, ink, extra) {
        const canvas = document.createElement("canvas");
        canvas.width = matrix[0].length;
        canvas.height = matrix.length;
        const pen = canvas.getContext("2d"), pixels = pen.createImageData(canvas.width, canvas.height);
        const [r, g, b] = rgb(parent, ink);
        matrix.forEach((row, i) => row.forEach((v, j) => {
          pixels.data.set([r, g, b, Math.round(255 * Math.min(1, Math.max(0, v)))], 4 * (i * canvas.width + j));
        }));
        pen.putImageData(pixels, 0, 0);
        return place(canvas, xs, ys, extra);
      },
      /* a square picture of bytes, three a pixel */
      picture(bytes, side, xs, ys, extra) {
        const canvas = document.createElement("canvas");
        canvas.width = canvas.height = side;
        const pen = canvas.getContext("2d"), pixels = pen.createImageData(side, side);
        for (let i = 0; i < side * side; i++) {
          for (let k = 0; k < 3; k++) pixels.data[4 * i + k] = bytes[3 * i + k];
          pixels.data[4 * i + 3] = 255;
        }
        pen.putImageData(pixels, 0, 0);
        return place(canvas, xs, ys, extra);
      },
      /* level lines of a grid of values, grid[i][j] at (xs[j], ys[i]) */
      contour(xs, ys, grid, levels, name, extra) {
        let path = "";
        for (const level of levels) {
          for (let i = 0; i + 1 < ys.length; i++) {
            for (let j = 0; j + 1 < xs.length; j++) {
              const corners = [[j, i], [j + 1, i], [j + 1, i + 1], [j, i + 1]], cuts = [];
              corners.forEach(([a, b], k) => {
                const [c, d] = corners[(k + 1) % 4], v = grid[b][a], w = grid[d][c];
                if ((v < level) === (w < level)) return;
                const t = (level - v) / (w - v);
                cuts.push([X(xs[a]) + t * (X(xs[c]) - X(xs[a])), Y(ys[b]) + t * (Y(ys[d]) - Y(ys[b]))]);
              });
              for (let k = 0; k + 1 < cuts.length; k += 2) {
                path += `M${cuts[k].map(v => v.toFixed(1))}L${cuts[k + 1].map(v => v.toFixed(1))}`;
              }
            }
          }
        }
        return svg("path", style(name, Object.assign({ d: path, "stroke-width": 1.3 }, extra)), inside);
      },
      text(point, words, extra) {
        return svg("text", Object.assign({ x: X(point[0]), y: Y(point[1]) }, extra), inside, words);
      },
    };
    return panel;
  }

  /* ---- controls ---- */

  function sliderValue(spec, position) {
    const part = position / spec.steps;
    const value = spec.log ? spec.low * Math.pow(spec.high / spec.low, part) :
      spec.low + (spec.high - spec.low) * part;
    return spec.whole ? Math.round(value) : Number(value.toPrecision(spec.log ? 6 : 12));
  }
  function sliderPosition(spec, value) {
    const t = spec.log ? Math.log(value / spec.low) / Math.log(spec.high / spec.low) :
      (value - spec.low) / (spec.high - spec.low);
    return Math.round(t * spec.steps);
  }
  function makeControl(spec, view) {
    const id = `${view.root.id}-${spec.name}`;
    if (spec.kind === "slider") {
      const input = html("input", { type: "range", id, min: 0, max: spec.steps, step: 1 });
      const output = html("output", { htmlFor: id });
      const show = () => {
        const words = say(view.state[spec.name], spec.digits) + (spec.unit ? ` ${spec.unit}` : "");
        input.value = sliderPosition(spec, view.state[spec.name]);
        input.setAttribute("aria-valuetext", words);
        output.textContent = words;
      };
      input.addEventListener("input", () => {
        view.stop();
        const position = Number(input.value), now = sliderPosition(spec, view.state[spec.name]);
        let value = sliderValue(spec, position);
        /* whole numbers of even ratio: a step changes the number by one at least */
        if (value === view.state[spec.name] && position !== now) value += Math.sign(position - now);
        view.set({ [spec.name]: Math.min(spec.high, Math.max(spec.low, value)) });
      });
      const box = html("div", { className: "live-control" },
        html("label", { htmlFor: id }, spec.label), html("span", { className: "live-slider" }, input, output));
      if (spec.play && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
        const button = html("button", { type: "button", className: "live-play" }, "Play");
        button.addEventListener("click", () => view.play(spec, button));
        box.lastChild.prepend(button);
      }
      return { box, show };
    }
    if (spec.kind === "choice") {
      const select = html("select", { id }, ...spec.options.map(
        ([value, words]) => html("option", { value }, words)));
      select.addEventListener("change", () => { view.stop(); view.set({ [spec.name]: select.value }); });
      return { box: html("div", { className: "live-control" }, html("label", { htmlFor: id }, spec.label), select),
        show: () => { select.value = view.state[spec.name]; } };
    }
    const box = html("input", { type: "checkbox", id });
    box.addEventListener("change", () => { view.stop(); view.set({ [spec.name]: box.checked }); });
    return { box: html("div", { className: "live-control live-switch" }, box, html("label", { htmlFor: id }, spec.label)),
      show: () => { box.checked = view.state[spec.name]; } };
  }

  /* ---- one figure on the page ---- */

  function View(root, definition, data) {
    const view = this;
    view.root = root;
    view.data = data;
    view.state = Object.assign({}, data.state);
    const stage = html("div", { className: "live-stage" });
    const form = html("div", { className: "live-controls" });
    const plot = svg("svg", { "class": "live-plot", role: "img", "aria-label": data.alt });
    const legend = html("div", { className: "live-legend" });
    const readout = html("p", { className: "live-readout", "aria-live": "polite" });
    const controls = data.controls.map(spec => makeControl(spec, view));
    const reset = html("button", { type: "button", className: "live-reset" }, "Reset");
    form.append(...controls.map(c => c.box), reset);
    stage.append(plot, legend, readout, form);
    root.append(stage);
    root.classList.add("live-on");
    let timer = null, waiting = false, y = 0, lastKey = null;

    view.svg = plot;
    view.stage = stage;
    view.form = form;
    view.set = change => {
      view.state = Object.assign({}, view.state, change);
      if (definition.changed) view.state = definition.changed(view.state, Object.keys(change), data) || view.state;
      view.later();
    };
    view.later = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; view.redraw(); });
    };
    view.redraw = () => {
      view.width = Math.max(260, stage.clientWidth || 700);
      y = 0;
      plot.replaceChildren();
      controls.forEach(c => c.show());
      const numbers = definition.numbers(view.state, data);
      definition.draw(view, view.state, numbers, data);
      plot.setAttribute("viewBox", `0 0 ${view.width} ${y}`);
      plot.setAttribute("width", view.width);
      plot.setAttribute("height", y);
    };
    /* n panels in a row where there is room, else below one another */
    view.panels = (specs, height, least = 250) => {
      const columns = Math.max(1, Math.min(specs.length, Math.floor(view.width / least)));
      const w = view.width / columns;
      const made = specs.map((spec, i) => makePanel(plot,
        { x: (i % columns) * w, y: y + Math.floor(i / columns) * height, w, h: height }, spec));
      y += Math.ceil(specs.length / columns) * height;
      return made;
    };
    view.space = height => { const at = y; y += height; return at; };
    /* entries: [mark, colour, words]; mark: line, dash, dot, square */
    view.legend = entries => {
      const key = JSON.stringify(entries);
      if (key === lastKey) return;
      lastKey = key;
      legend.replaceChildren(...entries.map(([mark, name, words]) => {
        const swatch = svg("svg", { width: 26, height: 12, viewBox: "0 0 26 12", "aria-hidden": "true" });
        if (mark === "dot") svg("circle", { cx: 13, cy: 6, r: 4.5, fill: colour(name) }, swatch);
        else if (mark === "ring") svg("circle", { cx: 13, cy: 6, r: 4.5, fill: "none", stroke: colour(name), "stroke-width": 2 }, swatch);
        else if (mark === "square") svg("rect", { x: 5, y: 1, width: 16, height: 10, fill: colour(name) }, swatch);
        else svg("line", { x1: 1, x2: 25, y1: 6, y2: 6, stroke: colour(name), "stroke-width": 2.5,
          "stroke-dasharray": mark === "dash" ? "5 3" : "none" }, swatch);
        return html("span", {}, swatch, words);
      }));
    };
    view.say = (...parts) => {
      const words = parts.join("");
      if (readout.textContent !== words) readout.textContent = words;
    };
    view.stop = () => {
      if (timer !== null) { clearInterval(timer.id); timer.button.textContent = "Play"; timer = null; }
    };
    view.play = (spec, button) => {
      if (timer !== null) { view.stop(); return; }
      const last = spec.steps;
      if (sliderPosition(spec, view.state[spec.name]) >= last) view.set({ [spec.name]: sliderValue(spec, 0) });
      button.textContent = "Stop";
      timer = { button, id: setInterval(() => {
        const next = sliderPosition(spec, view.state[spec.name]) + 1;
        if (next > last || !root.isConnected) { view.stop(); return; }
        view.set({ [spec.name]: sliderValue(spec, next) });
      }, 60) };
    };
    /* Things in the plot that move: by pointer, and by arrow keys while the plot has the
       focus. handle: {at(x, y) -> index or null, move(index, x, y), nudge(index, dx, dy),
       next(step)}; x and y in pixels of the plot. */
    view.draggable = (label, handle) => {
      plot.setAttribute("tabindex", "0");
      plot.setAttribute("role", "application");
      plot.setAttribute("aria-label", `${label} ${data.alt}`);
      let held = null;
      const place = event => {
        const box = plot.getBoundingClientRect(), scale = view.width / box.width;
        return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
      };
      plot.addEventListener("pointerdown", event => {
        held = handle.at(...place(event));
        if (held === null) return;
        plot.setPointerCapture(event.pointerId);
        event.preventDefault();
        plot.focus({ preventScroll: true });
        handle.move(held, ...place(event));
      });
      plot.addEventListener("pointermove", event => {
        if (held !== null) handle.move(held, ...place(event));
        else if (handle.hover) handle.hover(...place(event));
      });
      const release = () => { held = null; };
      plot.addEventListener("pointerup", release);
      plot.addEventListener("pointercancel", release);
      plot.crateKey = event => {
        const step = event.shiftKey ? 10 : 1;
        const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
        if (by) handle.nudge(by[0] * step, by[1] * step);
        else if ((event.key === " " || event.key === "Enter") && handle.press) handle.press();
        else if (event.key === "PageDown" && handle.next) handle.next(1);
        else if (event.key === "PageUp" && handle.next) handle.next(-1);
        else return;
        event.preventDefault();
      };
    };
    reset.addEventListener("click", () => { view.stop(); view.state = Object.assign({}, data.state); view.redraw(); });
    if (definition.begin) definition.begin(view, data);
    let known = 0;
    new ResizeObserver(() => {
      if (stage.clientWidth !== known) { known = stage.clientWidth; view.redraw(); }
    }).observe(stage);
    known = stage.clientWidth;
    view.redraw();
  }

  /* light and dark: pictures in canvases are drawn again in the other colours */
  const again = new MutationObserver(() => started.forEach(view => { if (view.root.isConnected) view.later(); }));
  const listen = () => {
    again.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    if (document.body) again.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  };
  listen();

  /* Jupyter listens to keys before the page does: ours go to the figure first. */
  const KEYS = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "PageUp", "PageDown", "Home", "End", " ", "Enter"];
  window.addEventListener("keydown", event => {
    const inside = event.target instanceof Element && event.target.closest("[data-live-figure]");
    if (!inside || !KEYS.includes(event.key)) return;
    event.stopPropagation();
    if (event.target.crateKey) event.target.crateKey(event);
  }, true);

  window.crateLive = {
    algebra, html, svg, colour, rgb, say, fixed,
    define(name, definition) { definitions[name] = definition; },
    /* Start the figures that are on the page and have not been started. */
    start() {
      for (const root of document.querySelectorAll("[data-live-figure]:not(.live-on)")) {
        const definition = definitions[root.dataset.liveFigure];
        const data = root.querySelector("script.live-data");
        if (!definition || !data || waiting.has(root)) continue;
        waiting.add(root);
        const begin = () => started.push(new View(root, definition, JSON.parse(data.textContent)));
        if (!definition.lazy || !window.IntersectionObserver) { begin(); continue; }
        /* what costs much begins when the reader comes near */
        new IntersectionObserver((entries, observer) => {
          if (entries.some(entry => entry.isIntersecting)) { observer.disconnect(); begin(); }
        }, { rootMargin: "600px" }).observe(root);
      }
    },
    view: name => started.filter(v => v.root.isConnected && v.root.dataset.liveFigure === name).pop(),
    /* What a figure computes at a state of its controls: for tests, and for the curious. */
    numbers(name, state) {
      const view = window.crateLive.view(name);
      return definitions[name].numbers(Object.assign({}, view.data.state, state), view.data);
    },
  };
})();

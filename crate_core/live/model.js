/* The trained model in the page: see model.py, whose `numbers` this repeats. */
(function () {
  "use strict";
  const L = window.crateLive, A = L.algebra;
  const GRID = 8, PATCH = 4, SIDE = GRID * PATCH, COUNT = GRID * GRID, TOKENS = COUNT + 1;

  function bytesOf(text) {
    const letters = atob(text), out = new Uint8Array(letters.length);
    for (let i = 0; i < out.length; i++) out[i] = letters.charCodeAt(i);
    return out;
  }
  /* half precision, as stored, to single */
  function singles(bytes) {
    const halves = new Uint16Array(bytes.buffer), out = new Float32Array(halves.length);
    for (let i = 0; i < halves.length; i++) {
      const h = halves[i], e = (h >> 10) & 31, f = h & 1023;
      const size = e === 0 ? f * Math.pow(2, -24) : (1 + f / 1024) * Math.pow(2, e - 15);
      out[i] = h & 32768 ? -size : size;
    }
    return out;
  }
  /* the integer mixed to 32 bits: the same as `scattered` */
  function mixed(x) {
    x = Math.imul(x ^ (x >>> 16), 0x7feb352d);
    x = Math.imul(x ^ (x >>> 15), 0x846ca68b);
    return (x ^ (x >>> 16)) >>> 0;
  }

  function network(data, trained) {
    const o = data.inputs, p = {}, stored = trained ? singles(bytesOf(o.weights)) : null;
    let at = 0;
    for (const [name, shape, middle, width] of o.parameters) {
      const count = shape.reduce((a, b) => a * b, 1);
      if (trained) p[name] = stored.subarray(at, at + count);
      else {
        const drawn = p[name] = new Float32Array(count).fill(middle);
        if (width > 0) for (let i = 0; i < count; i++) drawn[i] = middle + width * (mixed(1 + at + i) / 2147483648 - 1);
      }
      at += count;
    }
    /* matrices (out x in) turned to (in x out), so that rows are read in order */
    const turned = (name, rows, columns) => {
      const W = p[name], out = new Float32Array(W.length);
      for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) out[j * rows + i] = W[i * columns + j];
      return out;
    };
    const d = o.dim, width = PATCH * PATCH * 3;
    const attention = name => ({ project: turned(`${name}.project.weight`, d, d),
      output: turned(`${name}.output.weight`, d, d), bias: p[`${name}.output.bias`] });
    const norm = name => [p[`${name}.weight`], p[`${name}.bias`]];
    /* I + eta (D - D^T D): an ISTA step before its ReLU is one product */
    const step = D => {
      const M = new Float32Array(d * d);
      for (let i = 0; i < d; i++) {
        const row = new Float64Array(d);
        for (let k = 0; k < d; k++) for (let j = 0; j < d; j++) row[j] += D[k * d + i] * D[k * d + j];
        for (let j = 0; j < d; j++) M[i * d + j] = (i === j ? 1 : 0) + o.eta * (D[i * d + j] - row[j]);
      }
      return M;
    };
    const encoder = [], decoder = [];
    for (let l = 0; l < o.depth; l++) {
      encoder.push({ norm1: norm(`encoder.${l}.norm_attention`), attention: attention(`encoder.${l}.attention`),
        norm2: norm(`encoder.${l}.norm_sparsify`), step: step(p[`encoder.${l}.sparsify.weight`]),
        bases: orthonormal(p[`encoder.${l}.attention.project.weight`], o.heads, d) });
      decoder.push({ norm1: norm(`decoder.${l}.norm_densify`), densify: turned(`decoder.${l}.densify.weight`, d, d),
        norm2: norm(`decoder.${l}.norm_attention`), attention: attention(`decoder.${l}.attention`) });
    }
    return { o, d, encoder, decoder, embed: turned("patch_embedding.weight", d, width), embedBias: p["patch_embedding.bias"],
      classToken: p.class_token, maskToken: p.mask_token, encoderNorm: norm("encoder_norm"), decoderNorm: norm("decoder_norm"),
      predict: turned("prediction.weight", width, d), predictBias: p["prediction.bias"], positions: positions(d) };
  }
  /* rows of each head's projection made orthonormal (Gram-Schmidt, twice for the digits),
     as columns */
  function orthonormal(W, heads, d) {
    const rows = Array.from({ length: d }, (_, i) => Array.from(W.subarray(i * d, (i + 1) * d))), p = d / heads;
    for (let i = 0; i < d; i++) {
      for (let again = 0; again < 2; again++) {
        for (let j = i - i % p; j < i; j++) rows[i] = A.add(rows[i], rows[j], -A.dot(rows[i], rows[j]));
      }
      const size = A.norm(rows[i]);
      rows[i] = rows[i].map(x => x / size);
    }
    return Float32Array.from(A.transpose(rows).flat());
  }
  /* sine-cosine table, a zero row for the class token */
  function positions(d) {
    const table = new Float32Array(TOKENS * d), q = d / 4;
    for (let t = 0; t < COUNT; t++) {
      const at = (t + 1) * d, x = t % GRID, y = Math.floor(t / GRID);
      for (let i = 0; i < q; i++) {
        const f = Math.pow(10000, -i / q);
        table[at + i] = Math.sin(x * f);
        table[at + q + i] = Math.cos(x * f);
        table[at + 2 * q + i] = Math.sin(y * f);
        table[at + 3 * q + i] = Math.cos(y * f);
      }
    }
    return table;
  }

  /* x (rows x inner) times W (inner x columns), plus a bias */
  function product(x, W, rows, inner, columns, bias) {
    const out = new Float32Array(rows * columns), sum = new Float64Array(columns);
    for (let i = 0; i < rows; i++) {
      if (bias) sum.set(bias); else sum.fill(0);
      for (let k = 0; k < inner; k += 4) {  // four rows at once: the sums are read less often
        const at = i * inner + k, a0 = x[at], a1 = x[at + 1], a2 = x[at + 2], a3 = x[at + 3];
        let w0 = k * columns, w1 = w0 + columns, w2 = w1 + columns, w3 = w2 + columns;
        for (let j = 0; j < columns; j++) sum[j] += a0 * W[w0++] + a1 * W[w1++] + a2 * W[w2++] + a3 * W[w3++];
      }
      out.set(sum, i * columns);
    }
    return out;
  }
  function layerNorm(x, [gain, shift], d, eps) {
    const out = new Float32Array(x.length);
    for (let at = 0; at < x.length; at += d) {
      let mean = 0, square = 0;
      for (let j = 0; j < d; j++) mean += x[at + j];
      mean /= d;
      for (let j = 0; j < d; j++) square += (x[at + j] - mean) ** 2;
      const scale = 1 / Math.sqrt(square / d + eps);
      for (let j = 0; j < d; j++) out[at + j] = (x[at + j] - mean) * scale * gain[j] + shift[j];
    }
    return out;
  }
  /* coordinates of one head, contiguous and in double precision */
  function headOf(v, k, p, d) {
    const h = new Float64Array(TOKENS * p);
    for (let i = 0; i < TOKENS; i++) for (let c = 0; c < p; c++) h[i * p + c] = v[i * d + k * p + c];
    return h;
  }
  function attend(x, part, heads, d, keep) {
    const v = product(x, part.project, TOKENS, d, d), p = d / heads, scale = 1 / Math.sqrt(p);
    const averaged = new Float32Array(TOKENS * d), into = new Float64Array(p);
    for (let k = 0; k < heads; k++) {
      const h = headOf(v, k, p, d), scores = new Float64Array(TOKENS * TOKENS);
      for (let i = 0; i < TOKENS; i++) {  // one projection for queries and keys: symmetric
        for (let j = 0; j <= i; j++) {
          let s = 0;
          for (let c = 0, a = i * p, b = j * p; c < p; c++, a++, b++) s += h[a] * h[b];
          scores[i * TOKENS + j] = scores[j * TOKENS + i] = s * scale;
        }
      }
      for (let i = 0; i < TOKENS; i++) {
        const row = scores.subarray(i * TOKENS, (i + 1) * TOKENS);
        let top = -Infinity, total = 0;
        for (let j = 0; j < TOKENS; j++) if (row[j] > top) top = row[j];
        for (let j = 0; j < TOKENS; j++) total += (row[j] = Math.exp(row[j] - top));
        into.fill(0);
        for (let j = 0; j < TOKENS; j++) {
          const w = row[j] /= total;
          for (let c = 0, b = j * p; c < p; c++, b++) into[c] += w * h[b];
        }
        averaged.set(into, i * d + k * p);
        if (keep) keep[k].push(row);
      }
    }
    return product(averaged, part.output, TOKENS, d, d, part.bias);
  }
  const sum = (a, b, sign = 1) => a.map((x, i) => x + sign * b[i]);

  /* R^c of the tokens at root mean square norm one, in the head's orthonormal bases */
  function rate(x, bases, heads, d, eps) {
    let energy = 0;
    for (const v of x) energy += v * v;
    const p = d / heads, weight = p / (TOKENS * eps * eps) * TOKENS / energy;
    const v = product(x, bases, TOKENS, d, d);
    let total = 0;
    for (let k = 0; k < heads; k++) {
      const h = headOf(v, k, p, d), gram = A.zeros(p, p);
      for (let a = 0; a < p; a++) {
        for (let b = 0; b <= a; b++) {
          let s = 0;
          for (let i = 0; i < TOKENS * p; i += p) s += h[i + a] * h[i + b];
          gram[a][b] = gram[b][a] = (a === b ? 1 : 0) + weight * s;
        }
      }
      A.cholesky(gram).forEach((row, i) => { total += Math.log(row[i]); });
    }
    return total;
  }

  /* the picture (bytes) in model units, as patches: rows, columns, channels inside each */
  function patches(bytes, o) {
    const out = new Float32Array(COUNT * PATCH * PATCH * 3);
    let at = 0;
    for (let t = 0; t < COUNT; t++) {
      for (let r = 0; r < PATCH; r++) {
        for (let c = 0; c < PATCH; c++) {
          const pixel = (Math.floor(t / GRID) * PATCH + r) * SIDE + (t % GRID) * PATCH + c;
          for (let k = 0; k < 3; k++) out[at++] = (bytes[pixel * 3 + k] / 255 - o.mean[k]) / o.std[k];
        }
      }
    }
    return out;
  }

  function forward(net, input, hidden) {
    const { o, d } = net, heads = o.heads, width = PATCH * PATCH * 3;
    const embedded = product(input, net.embed, COUNT, width, d, net.embedBias);
    let x = new Float32Array(TOKENS * d);
    x.set(net.classToken);
    for (let t = 0; t < COUNT; t++) {
      x.set(hidden[t] ? net.maskToken : embedded.subarray(t * d, (t + 1) * d), (t + 1) * d);
    }
    x = sum(x, net.positions);
    const attentions = [], rateBefore = [], rateAfter = [], nonzeros = [];
    for (const layer of net.encoder) {
      const keep = Array.from({ length: heads }, () => []), normed = layerNorm(x, layer.norm1, d, 1e-5);
      const half = sum(x, attend(normed, layer.attention, heads, d, keep));
      attentions.push(keep);
      rateBefore.push(rate(normed, layer.bases, heads, d, o.eps));
      rateAfter.push(rate(layerNorm(half, layer.norm1, d, 1e-5), layer.bases, heads, d, o.eps));
      x = product(layerNorm(half, layer.norm2, d, 1e-5), layer.step, TOKENS, d, d)
        .map(v => Math.max(0, v - o.eta * o.lambd));
      let count = 0;
      for (const v of x) if (v !== 0) count++;
      nonzeros.push(count / x.length);
    }
    let y = layerNorm(x, net.encoderNorm, d, 1e-6);
    for (const layer of net.decoder) {
      const v = product(layerNorm(y, layer.norm1, d, 1e-5), layer.densify, TOKENS, d, d);
      y = sum(v, attend(layerNorm(v, layer.norm2, d, 1e-5), layer.attention, heads, d), -1);
    }
    const all = product(layerNorm(y, net.decoderNorm, d, 1e-6), net.predict, TOKENS, d, width, net.predictBias);
    return { predicted: all.subarray(width), attentions, rateBefore, rateAfter, nonzeros };
  }

  const networks = {}, kept = { key: null, value: null };
  let own = null;  // the reader's own picture, if there is one
  function computed(state, data) {
    const key = [state.picture, state.trained, state.hidden.join("")].join();
    if (kept.key === key && state.picture !== "own") return kept.value;
    const net = networks[state.trained] = networks[state.trained] || network(data, state.trained);
    const bytes = state.picture === "own" ? own : bytesOf(data.inputs.pictures[state.picture]);
    const input = patches(bytes, data.inputs), began = performance.now();
    const found = forward(net, input, state.hidden);
    Object.assign(kept, { key, value: Object.assign(found, { input, ms: performance.now() - began }) });
    return kept.value;
  }

  function numbers(state, data) {
    const o = computed(state, data), width = PATCH * PATCH * 3;
    let error = 0, yardstick = 0, count = 0;
    for (let t = 0; t < COUNT; t++) {
      if (!state.hidden[t]) continue;
      count += width;
      for (let j = t * width; j < (t + 1) * width; j++) {
        error += (o.predicted[j] - o.input[j]) ** 2;
        yardstick += o.input[j] ** 2;
      }
    }
    return {
      predicted: Array.from({ length: COUNT }, (_, t) => Array.from(o.predicted.subarray(t * width, (t + 1) * width))),
      attention: Array.from(o.attentions[state.layer - 1][state.head - 1][1 + state.patch]),
      rate_before: o.rateBefore, rate_after: o.rateAfter, nonzeros: o.nonzeros,
      error: count ? error / count : 0, error_mean: count ? yardstick / count : 0,
    };
  }

  /* patches in model units to pixels; `use(t)` says where a patch comes from */
  function pixels(o, use) {
    const out = new Uint8ClampedArray(SIDE * SIDE * 3), width = PATCH * PATCH * 3;
    for (let t = 0; t < COUNT; t++) {
      const source = use(t);
      for (let j = 0; j < width; j++) {
        const r = Math.floor(j / (3 * PATCH)), c = Math.floor(j / 3) % PATCH, k = j % 3;
        const pixel = (Math.floor(t / GRID) * PATCH + r) * SIDE + (t % GRID) * PATCH + c;
        out[pixel * 3 + k] = 255 * ((source ? source[t * width + j] : 0) * o.std[k] + o.mean[k]);
      }
    }
    return out;
  }
  /* the patches with the lowest numbers stay visible */
  function drawn(ratio, draw) {
    const order = Array.from({ length: COUNT }, (_, i) => i)
      .sort((i, j) => mixed(1000 * (draw + 1) + i) - mixed(1000 * (draw + 1) + j));
    const hidden = new Array(COUNT).fill(0);
    order.slice(COUNT - Math.round(ratio * COUNT)).forEach(i => { hidden[i] = 1; });
    return hidden;
  }

  let panels = [];
  L.define("model", {
    lazy: true,
    numbers,
    changed(state, names) {
      return names.includes("ratio") && !names.includes("hidden") ?
        Object.assign({}, state, { hidden: drawn(state.ratio, state.draw) }) : state;
    },
    begin(view) {
      const again = L.html("button", { type: "button", className: "live-draw" }, "Hide other patches");
      again.addEventListener("click", () => {
        const draw = view.state.draw + 1;
        view.set({ draw, hidden: drawn(view.state.ratio, draw) });
      });
      const id = `${view.root.id}-own`, file = L.html("input", { type: "file", id, accept: "image/*" });
      file.addEventListener("change", async () => {
        if (!file.files.length) return;
        const picture = await createImageBitmap(file.files[0]), side = Math.min(picture.width, picture.height);
        const canvas = L.html("canvas", { width: SIDE, height: SIDE }), pen = canvas.getContext("2d");
        pen.imageSmoothingQuality = "high";
        pen.drawImage(picture, (picture.width - side) / 2, (picture.height - side) / 2, side, side, 0, 0, SIDE, SIDE);
        const rgba = pen.getImageData(0, 0, SIDE, SIDE).data;
        own = Uint8Array.from({ length: SIDE * SIDE * 3 }, (_, i) => rgba[4 * Math.floor(i / 3) + i % 3]);
        const select = view.form.querySelector("select");
        if (!select.querySelector("[value=own]")) select.append(L.html("option", { value: "own" }, "your own"));
        view.set({ picture: "own" });
      });
      view.form.append(again, L.html("div", { className: "live-control" },
        L.html("label", { htmlFor: id }, "Your own picture (it stays in this browser)"), file));

      const patchAt = (px, py) => {
        const panel = panels.find(p => p.contains(px, py));
        if (!panel) return null;
        const [x, y] = panel.toData(px, py);
        const t = Math.min(GRID - 1, Math.floor(y)) * GRID + Math.min(GRID - 1, Math.floor(x));
        return { panel: panels.indexOf(panel), t };
      };
      const toggle = (t, to) => {
        const hidden = view.state.hidden.slice();
        hidden[t] = to;
        view.set({ hidden, patch: t, ratio: hidden.reduce((a, b) => a + b, 0) / COUNT });
      };
      let painting = 0;
      view.draggable("Click a patch of the first picture to hide or show it; by keyboard the arrow keys choose a patch, " +
        "the space bar hides or shows it.", {
        at(px, py) {
          const found = patchAt(px, py);
          if (!found) return null;
          if (found.panel > 0) { view.set({ patch: found.t }); return null; }
          painting = 1 - view.state.hidden[found.t];
          return found.t;
        },
        move(_, px, py) {
          const found = patchAt(px, py);
          if (found && found.panel === 0 && view.state.hidden[found.t] !== painting) toggle(found.t, painting);
        },
        hover(px, py) {
          const found = patchAt(px, py);
          if (found && found.t !== view.state.patch) view.set({ patch: found.t });
        },
        nudge(dx, dy) {
          const x = view.state.patch % GRID + Math.sign(dx), y = Math.floor(view.state.patch / GRID) + Math.sign(dy);
          if (x >= 0 && x < GRID && y >= 0 && y < GRID) view.set({ patch: y * GRID + x });
        },
        press() { toggle(view.state.patch, 1 - view.state.hidden[view.state.patch]); },
      });
    },
    draw(view, state, seen, data) {
      const o = data.inputs, found = computed(state, data), layers = found.nonzeros.map((_, i) => i + 1);
      const square = title => ({ title, x: [0, GRID], y: [GRID, 0], equal: true, bare: true });
      const w = view.width >= 600 ? view.width / 4 : view.width / 2;
      panels = view.panels([square("what it sees (click)"), square("completed"), square("original"),
        square(`head ${state.head} of layer ${state.layer}`)], w + 18, 150);
      const [sees, completed, original, attention] = panels, { input, predicted } = found;
      const whole = [[0, GRID], [0, GRID]];
      sees.picture(pixels(o, t => state.hidden[t] ? null : input), SIDE, ...whole);
      completed.picture(pixels(o, t => state.hidden[t] ? predicted : input), SIDE, ...whole);
      original.picture(pixels(o, () => input), SIDE, ...whole);
      state.hidden.forEach((hidden, t) => {
        const x = t % GRID, y = Math.floor(t / GRID);
        if (!hidden) return;
        L.svg("rect", { x: sees.X(x), y: sees.Y(y), width: sees.X(1) - sees.X(0), height: sees.Y(1) - sees.Y(0),
          fill: L.colour("surface"), stroke: L.colour("grid") }, sees.inside);
      });
      attention.picture(pixels(o, () => input), SIDE, ...whole, { opacity: 0.25 });
      const weights = seen.attention.slice(1), top = Math.max(...weights), map = [];
      for (let y = 0; y < GRID; y++) map.push(weights.slice(y * GRID, (y + 1) * GRID).map(v => 0.9 * v / top));
      attention.image(map, [0, GRID], [0, GRID], "blue");
      const px = state.patch % GRID, py = Math.floor(state.patch / GRID);
      for (const panel of panels) {
        L.svg("rect", { x: panel.X(px), y: panel.Y(py), width: panel.X(1) - panel.X(0), height: panel.Y(1) - panel.Y(0),
          fill: "none", stroke: L.colour("orange"), "stroke-width": 2.5 }, panel.inside);
      }
      const ticks = layers.map(i => [i, String(i)]);
      const most = 1.15 * Math.max(...seen.rate_before, ...seen.rate_after);
      const [rates, sparse] = view.panels([
        { title: "Rᶜ, each compression", x: [0.5, 4.5], y: [0, most], xticks: ticks, xlabel: "encoder layer" },
        { title: "nonzero entries", x: [0.5, 4.5], y: [0, 1], xticks: ticks, xlabel: "encoder layer" }], 200, 160);
      const bar = rates.area.w / 12;
      layers.forEach((l, i) => {
        rates.bar(l - 0.18, 0, seen.rate_before[i], bar, "noise");
        rates.bar(l + 0.18, 0, seen.rate_after[i], bar, "blue");
        sparse.bar(l, 0, seen.nonzeros[i], 2 * bar, "orange");
      });
      view.legend([["square", "noise", "before the layer's compression"], ["square", "blue", "after it"],
        ["square", "orange", "after its sparsification; outlined: the patch that looks"]]);
      const hidden = state.hidden.reduce((a, b) => a + b, 0), mean = 1 / TOKENS;
      view.say((hidden ? `${hidden} of 64 patches hidden: squared error ${L.fixed(seen.error, 3)} on them, where the average ` +
        `colour of the training pictures makes ${L.fixed(seen.error_mean, 3)}. ` : "Nothing is hidden. ") +
        `Largest attention weight ${L.fixed(top / mean, 1)} times the mean. ` +
        `${state.trained ? "Trained network." : "Network before training."}`);
      view.milliseconds = found.ms;
    },
  });
})();

/* Encoder and decoder layers: see layer.py, whose `numbers` this repeats. */
(function () {
  "use strict";
  const L = window.crateLive, A = L.algebra;

  /* (1 - kappa beta) Z + kappa MSSA(Z), softmax or exact; step = kappa beta */
  function compress(z, bases, step, o, exact) {
    const n = z.length, p = bases[0][0].length, beta = p / (n * o.eps * o.eps);
    const out = z.map(row => row.map(x => (1 - step) * x));
    for (const basis of bases) {
      const V = A.matmul(z, basis);
      let kept;
      if (exact) {  // V - (I + beta V V^T)^{-1} V, token by token
        const factor = A.cholesky(A.gramPlusIdentity(V, beta));
        kept = V.map(v => A.add(v, A.choleskySolve(factor, v), -1));
      } else kept = V.map(v => {
        const weights = A.softmax(V.map(u => o.scale * A.dot(u, v)));
        return V[0].map((_, c) => weights.reduce((s, w, j) => s + w * V[j][c], 0));
      });
      /* with softmax beta is in MSSA too: kappa beta = step in both */
      const back = A.matmul(kept, A.transpose(basis));
      for (let i = 0; i < n; i++) for (let j = 0; j < out[i].length; j++) out[i][j] += step * back[i][j];
    }
    return out;
  }
  function rate(z, bases, eps) {
    const p = bases[0][0].length, beta = p / (z.length * eps * eps);
    let total = 0;
    for (const basis of bases) {
      A.cholesky(A.gramPlusIdentity(A.matmul(z, basis), beta)).forEach((row, i) => { total += Math.log(row[i]); });
    }
    return total;
  }

  let kept = null;  // the walk does not depend on the half step shown
  function walk(state, data) {
    const key = [state.compression, state.step, state.lambd, state.noise].join();
    if (kept && kept.key === key) return kept;
    const o = data.inputs, K = o.bases.length, d = o.bases[0].length, p = o.bases[0][0].length, n = o.codes.length;
    const Q = A.zeros(d, d), identity = A.zeros(d, d), exact = state.compression === "exact";
    for (let i = 0; i < d; i++) {
      identity[i][i] = 1;
      for (let k = 0; k < K; k++) for (let j = 0; j < p; j++) Q[i][k * p + j] = o.bases[k][i][j];
    }
    const blocks = o.bases.map((_, k) => identity.map(row => row.slice(k * p, (k + 1) * p)));
    const codes = o.codes.map((code, i) => {
      const row = new Array(d).fill(0), k = Math.floor(i * K / n);
      code.forEach((x, j) => { row[k * p + j] = x; });
      return row;
    });
    const clean = A.matmul(codes, A.transpose(Q));
    const z = clean.map((row, i) => A.add(row, o.noise[i], state.noise / Math.sqrt(d)));
    const path = [z], truths = [clean], rates = [rate(z, o.bases, o.eps)], layers = [];
    for (let l = 0; l < o.layers; l++) {
      layers.push(l === 0 ? { own: o.bases, atoms: Q, lambd: state.lambd } :
        { own: blocks, atoms: identity, lambd: o.later * state.lambd });
    }
    const last = list => list[list.length - 1];
    for (const { own, atoms, lambd } of layers) {
      const half = compress(last(path), own, state.step, o, exact);
      /* ReLU(half + D^T (half - D half) - lambda), step size 1 */
      const residual = half.map((row, i) => A.add(row, A.matmul([half[i]], A.transpose(atoms))[0], -1));
      const after = A.matmul(residual, atoms).map((row, i) => row.map((x, j) => Math.max(0, half[i][j] + x - lambd)));
      path.push(half, after);
      truths.push(last(truths), codes);
      rates.push(rate(half, own, o.eps), rate(after, blocks, o.eps));
    }
    for (const { own, atoms } of layers.slice().reverse()) {
      const dense = A.matmul(last(path), A.transpose(atoms)), after = compress(dense, own, -state.step, o, exact);
      path.push(dense, after);
      const truth = own === blocks ? codes : clean;
      truths.push(truth, truth);
      rates.push(rate(dense, own, o.eps), rate(after, own, o.eps));
    }
    const energy = (a, b) => a.reduce((s, row, i) => s + row.reduce((t, x, j) => t + (x - b[i][j]) ** 2, 0), 0);
    const before = energy(z, clean);
    kept = { key, path, truths, rates, left: path.map((t, i) => energy(t, truths[i]) / before),
      nonzero: path.map(t => t.reduce((s, row) => s + row.filter(x => Math.abs(x) > o.zero).length, 0) / (n * d)) };
    return kept;
  }

  function numbers(state, data) {
    const o = walk(state, data);
    return { tokens: o.path[state.stage], truth: o.truths[state.stage], left: o.left, nonzero: o.nonzero, rate: o.rates };
  }

  function stageName(stage, layers) {
    if (stage === 0) return "the noisy tokens";
    if (stage <= 2 * layers) {
      return `encoder layer ${Math.ceil(stage / 2)}, ${stage % 2 ? "compressed" : "sparsified"}`;
    }
    const back = stage - 2 * layers;
    return `decoder layer ${Math.ceil(back / 2)}, ${back % 2 ? "out of the dictionary" : "compression taken back"}`;
  }
  /* positive in blue, negative in orange */
  function table(panel, values, n, d) {
    for (const [sign, ink] of [[1, "blue"], [-1, "orange"]]) {
      panel.image(values.map(row => row.map(x => Math.min(1, Math.max(0, sign * x) / 0.9))), [0, d], [0, n], ink);
    }
  }
  L.define("layer", {
    numbers,
    draw(view, state, seen, data) {
      const o = data.inputs, n = seen.tokens.length, d = seen.tokens[0].length, K = o.bases.length, stage = state.stage;
      const map = title => ({ title, x: [0, d], y: [n, 0], noXTicks: true, noYTicks: true, noGrid: true, xlabel: "coordinate" });
      const maps = view.panels([map("tokens now"), map("clean, in the same coordinates")], 230, 300);
      const coded = stage >= 2 && stage <= 4 * o.layers - 2;
      [seen.tokens, seen.truth].forEach((values, i) => {
        table(maps[i], values, n, d);
        for (let k = 1; k < K; k++) {
          maps[i].line([[0, k * n / K], [d, k * n / K]], "muted", { "stroke-width": 0.7 });
          if (coded) maps[i].line([[k * d / K, 0], [k * d / K, n]], "muted", { "stroke-width": 0.7 });
        }
      });
      const last = seen.left.length - 1, top = list => 1.1 * Math.max(...list);
      const axes = (title, list, most) => ({ title, x: [0, last], y: [0, most || Math.min(top(list), 5)], xlabel: "half steps" });
      const curves = view.panels([axes("noise left", seen.left), axes("nonzero entries", seen.nonzero, 1.1),
        axes("Rᶜ", seen.rate, top(seen.rate))], 190, 170);
      [[seen.left, "blue"], [seen.nonzero, "yellow"], [seen.rate, "pink"]].forEach(([list, ink], i) => {
        const panel = curves[i], from = panel.X(2 * o.layers);
        L.svg("rect", { x: from, y: panel.area.y, width: panel.X(last) - from, height: panel.area.h,
          fill: L.colour("grid"), opacity: 0.45 }, panel.inside);
        panel.line([[stage, 0], [stage, 1e3]], "muted", { "stroke-width": 1 });
        panel.line(list.map((v, s) => [s, v]), ink);
        list.forEach((v, s) => panel.dot([s, v], ink, s % 2 ? 0 : 1, { r: 3 }));
        panel.dot([stage, list[stage]], "ink", 0, { r: 5 });
      });
      view.legend([["square", "blue", "positive entry"], ["square", "orange", "negative entry"],
        ["square", "grid", "curves: through the decoder"]]);
      const best = seen.left.slice(0, 2 * o.layers + 1);
      view.say(`${stage} of ${last} half steps: ${stageName(stage, o.layers)}. Noise left ${L.say(100 * seen.left[stage])} %, ` +
        `nonzero ${L.say(100 * seen.nonzero[stage])} %, Rᶜ ${L.say(seen.rate[stage], 3)} nats. In the encoder the least noise is left ` +
        `after ${best.indexOf(Math.min(...best))} half steps (${L.say(100 * Math.min(...best))} %).`);
    },
  });
})();

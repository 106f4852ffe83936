/* Denoise and compress: see denoise_compress.py, whose `numbers` this repeats. */
(function () {
  "use strict";
  const L = window.crateLive, A = L.algebra;
  const COLOURS = ["blue", "orange", "green", "pink"];

  /* unit vectors of a token's own part and of the rest */
  function frame(z, inside, basis) {
    if (z.length === 2) {
      const own = basis.map(row => row[0]);
      return [own, [-own[1], own[0]]];
    }
    const rest = A.add(z, inside, -1), a = A.norm(inside), b = A.norm(rest);
    return [inside.map(x => x / a), rest.map(x => x / b)];
  }
  const coordinates = (z, basis) => basis[0].map((_, j) => z.reduce((s, x, i) => s + x * basis[i][j], 0));
  const combine = (basis, c) => basis.map(row => A.dot(row, c));

  function tokensOf(state, data) {
    const space = data.inputs[state.space], K = space.bases.length, d = space.bases[0].length;
    const sigma = state.noise / Math.sqrt(d), z = [], clean = [];
    for (let i = 0; i < state.tokens; i++) {
      const basis = space.bases[i % K], x = combine(basis, space.codes[i]);
      let token = A.add(x, space.noise[i], sigma);
      const put = state.moved[i];
      if (put) {
        const [own, normal] = frame(token, combine(basis, coordinates(token, basis)), basis);
        token = own.map((u, j) => put[0] * u + put[1] * normal[j]);
      }
      clean.push(x);
      z.push(token);
    }
    return { z, clean, bases: space.bases, sigma, K, d, p: space.bases[0][0].length };
  }

  /* the posterior mean: shrink in each subspace, weighted by the posterior */
  function denoise(z, bases, sigma) {
    const p = bases[0][0].length, d = z.length, s2 = sigma * sigma, t2 = 1 / p, spectrum = t2 + s2;
    const parts = bases.map(basis => {
      const c = coordinates(z, basis), inside = combine(basis, c), rest = A.add(z, inside, -1);
      const logJoint = -0.5 * (A.dot(c, c) / spectrum + A.dot(rest, rest) / s2 +
        p * Math.log(spectrum) + (d - p) * Math.log(s2));
      return { inside, logJoint };
    });
    const gamma = A.softmax(parts.map(part => part.logJoint));
    return z.map((_, i) => parts.reduce((s, part, k) => s + gamma[k] * (t2 / spectrum) * part.inside[i], 0));
  }

  function numbers(state, data) {
    const { z, clean, bases, sigma, K, d, p } = tokensOf(state, data);
    const n = z.length, beta = p / (n * state.eps * state.eps);
    /* gradient / beta = sum_k U_k (I + beta V_k V_k^T)^{-1} U_k^T z_i */
    const compressed = z.map(row => row.map(() => 0));
    for (const basis of bases) {
      const V = z.map(row => coordinates(row, basis));
      const factor = A.cholesky(A.gramPlusIdentity(V, beta));
      V.forEach((v, i) => {
        const kept = combine(basis, A.choleskySolve(factor, v));
        for (let j = 0; j < d; j++) compressed[i][j] -= kept[j];
      });
    }
    const denoised = z.map(row => A.add(denoise(row, bases, sigma), row, -1));
    const inside = z.map((row, i) => combine(bases[i % K], coordinates(row, bases[i % K])));
    const frames = z.map((row, i) => frame(row, inside[i], bases[i % K]));
    const seen = vectors => vectors.map((v, i) => frames[i].map(axis => A.dot(axis, v)));
    const left = arrows => {
      let after = 0, before = 0;
      z.forEach((row, i) => row.forEach((x, j) => {
        before += (x - clean[i][j]) ** 2;
        after += (x + arrows[i][j] - clean[i][j]) ** 2;
      }));
      return after / before;
    };
    return {
      load: n / (K * p),
      tokens: seen(z), denoised: seen(denoised), compressed: seen(compressed),
      cosine: z.map((_, i) => A.cosine(denoised[i], compressed[i])),
      to_own_subspace: A.mean(z.map((row, i) => A.cosine(compressed[i], A.add(inside[i], row, -1)))),
      left_denoised: left(denoised), left_compressed: left(compressed),
    };
  }

  /* direction of a token's own line or ray in the picture, and of its normal */
  function pictured(i, state, data) {
    const K = data.inputs[state.space].bases.length, k = i % K;
    if (state.space !== "many") {
      const own = data.inputs[state.space].bases[k].map(row => row[0]);
      return [own, [-own[1], own[0]]];
    }
    const angle = k * Math.PI / 2, side = Math.floor(i / K) % 2 === 0 ? 1 : -1;
    const own = [Math.round(Math.cos(angle)), Math.round(Math.sin(angle))];
    return [own, [-side * own[1], side * own[0]]];
  }
  const place = ([own, normal], [a, b]) => [a * own[0] + b * normal[0], a * own[1] + b * normal[1]];

  let shown = null;
  L.define("denoise-compress", {
    numbers,
    changed(state, names, data) {
      const next = Object.assign({}, state);
      if (names.includes("space")) next.moved = {};
      next.chosen = Math.min(next.chosen, next.tokens - 1);
      return next;
    },
    begin(view, data) {
      const put = (i, x, y) => {
        const axes = pictured(i, view.state, data), many = view.state.space === "many";
        let a = x * axes[0][0] + y * axes[0][1], b = x * axes[1][0] + y * axes[1][1];
        if (many) { a = Math.max(a, 0.02); b = Math.max(b, 0.02); }
        view.set({ moved: Object.assign({}, view.state.moved, { [i]: [a, b] }), chosen: i });
      };
      const where = i => place(pictured(i, view.state, data), shown.numbers.tokens[i]);
      view.draggable("Drag a token, or move it by the arrow keys; page up and page down choose another.", {
        at(px, py) {
          let best = null, least = 18;
          shown.numbers.tokens.forEach((_, i) => {
            const [x, y] = where(i), far = Math.hypot(shown.panel.X(x) - px, shown.panel.Y(y) - py);
            if (far < least) { least = far; best = i; }
          });
          return best;
        },
        move(i, px, py) { put(i, ...shown.panel.toData(px, py)); },
        nudge(dx, dy) {
          const i = view.state.chosen, [x, y] = where(i);
          put(i, x + 0.02 * dx, y - 0.02 * dy);
        },
        next(step) {
          const n = view.state.tokens;
          view.set({ chosen: (view.state.chosen + step + n) % n });
        },
      });
    },
    draw(view, state, seen, data) {
      const [panel] = view.panels([{ x: [-1.6, 1.6], y: [-1.5, 1.5], equal: true, wide: true, bare: true }],
        Math.min(460, 0.95 * view.width));
      shown = { panel, numbers: seen };
      const many = state.space === "many", K = data.inputs[state.space].bases.length;
      for (let k = 0; k < K; k++) {
        const [own] = pictured(k, state, data), far = 3;
        panel.line([many ? [0, 0] : [-far * own[0], -far * own[1]], [far * own[0], far * own[1]]],
          "muted", { "stroke-width": 1.2 });
        const upright = Math.abs(own[1]) > 0.9, far2 = upright ? 1.4 : 1.22;
        panel.text([far2 * own[0] + (upright ? 0.05 : 0), far2 * own[1] - (upright ? 0.03 : 0.14)],
          `${many ? "subspace" : "line"} ${k + 1}`, { "text-anchor": upright ? "start" : "middle" });
      }
      seen.tokens.forEach((token, i) => {
        const axes = pictured(i, state, data), from = place(axes, token);
        const end = arrow => place(axes, [token[0] + arrow[0], token[1] + arrow[1]]);
        panel.arrow(from, end(seen.denoised[i]), "green", { "stroke-width": 3.5, opacity: 0.75 });
        panel.arrow(from, end(seen.compressed[i]), "ink", { "stroke-width": 1.6, "stroke-dasharray": "4 2" });
      });
      seen.tokens.forEach((token, i) => {
        const from = place(pictured(i, state, data), token);
        panel.dot(from, COLOURS[i % K], i % K, { style: "touch-action: none; cursor: grab" });
        if (i === state.chosen) panel.dot(from, "ink", 0, { r: 9, fill: "none", stroke: "var(--live-ink)" });
      });
      view.legend([["line", "green", "to the posterior mean"],
        ["dash", "ink", "against the gradient of Rᶜ, divided by β"],
        ["ring", "ink", "the token that you move"]]);
      const i = state.chosen;
      view.say(`Mean cosine of the two arrows ${L.fixed(A.mean(seen.cosine))}; at the marked token ` +
        `${L.fixed(seen.cosine[i])}. Noise left after the step: ${L.say(100 * seen.left_denoised)} % by the ` +
        `posterior mean, ${L.say(100 * seen.left_compressed)} % by compression. ` +
        `n/(Kp) = ${L.say(seen.load)} tokens per dimension.`);
    },
  });
})();

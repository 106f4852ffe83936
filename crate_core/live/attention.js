/* Attention as a gate: see attention.py, whose `numbers` this repeats. */
(function () {
  "use strict";
  const L = window.crateLive, A = L.algebra;

  function numbers(state, data) {
    const { heads: K, rank: p, codes, noise } = data.inputs, n = state.tokens, d = K * p;
    const sigma = state.noise / Math.sqrt(d), labels = [], clean = [], z = [];
    for (let k = 0; k < K; k++) {
      for (let i = k; i < n; i += K) {  // sorted by subspace
        const x = new Array(d).fill(0);
        for (let j = 0; j < p; j++) x[k * p + j] = codes[i][j];
        labels.push(k);
        clean.push(x);
        z.push(A.add(x, noise[i], sigma));
      }
    }
    /* the bases are columns of the identity: a head sees p coordinates */
    const head = (rows, k) => rows.map(row => row.slice(k * p, (k + 1) * p));
    const beta = p / (n * state.eps * state.eps), steps = { exact: [], attention: [] };
    let weights = null;
    for (let k = 0; k < K; k++) {
      const V = head(z, k), factor = A.cholesky(A.gramPlusIdentity(V, beta));
      steps.exact.push(V.map(v => A.add(v, A.choleskySolve(factor, v), -1)));
      const W = V.map(v => A.softmax(V.map(u => state.scale * A.dot(u, v))));
      steps.attention.push(A.matmul(W, V));
      if (k === 0) weights = W;
    }
    const gains = {}, left = {};
    for (const name of ["exact", "attention"]) {
      const kept = [0, 0], present = [0, 0];
      let after = 0, before = 0;
      for (let k = 0; k < K; k++) {
        const V = head(z, k), X = head(clean, k);
        V.forEach((v, i) => {
          const other = labels[i] === k ? 0 : 1, moved = steps[name][k][i];
          kept[other] += A.dot(moved, v);
          present[other] += A.dot(v, v);
          for (let j = 0; j < p; j++) {
            before += (v[j] - X[i][j]) ** 2;
            after += (moved[j] - X[i][j]) ** 2;
          }
        });
      }
      gains[name] = kept.map((x, i) => x / present[i]);
      left[name] = after / before;
    }
    return { load: n / d, weights, gains, left };
  }

  L.define("attention", {
    numbers,
    draw(view, state, seen, data) {
      const n = state.tokens, names = ["unchanged", "exact", "attention"];
      const colours = ["noise", "blue", "orange"];
      const gains = [[1, 1], seen.gains.exact, seen.gains.attention];
      const left = [1, seen.left.exact, seen.left.attention];
      const top = Math.max(1.15, 1.1 * Math.min(Math.max(...left), 3));
      const [map, bars, noise] = view.panels([
        { title: "weights of head 1 (cube root)", x: [0, n], y: [n, 0], equal: true, noGrid: true,
          noXTicks: true, noYTicks: true, xlabel: "averaged token" },
        { title: "kept of a token's part in", x: [-0.5, 1.5], y: [0, 1.1],
          xticks: [[0, "own head"], [1, "other heads"]] },
        { title: "noise left", x: [-0.5, 2.5], y: [0, top],
          xticks: names.map((name, i) => [i, name]) },
      ], 260, 240);
      const most = Math.max(...seen.weights.map(row => Math.max(...row)));
      map.image(seen.weights.map(row => row.map(w => Math.cbrt(w / most))), [0, n], [0, n], "blue");
      const own = seen.weights.filter((_, i) => i < Math.ceil(n / data.inputs.heads)).length;
      map.line([[0, own], [own, own], [own, 0]], "ink", { "stroke-width": 1, "stroke-dasharray": "3 2" });
      const w = bars.area.w / 9;
      names.forEach((_, i) => {
        for (const side of [0, 1]) {
          const bar = bars.bar(side, 0, Math.max(0, gains[i][side]), w, colours[i]);
          bar.setAttribute("transform", `translate(${(i - 1) * (w + 3)} 0)`);
        }
        noise.bar(i, 0, left[i], noise.area.w / 5, colours[i]);
        noise.text([i, Math.min(left[i], top * 0.94)], left[i] > 100 ? ">100" : L.fixed(left[i]),
          { "text-anchor": "middle", dy: left[i] > top * 0.94 ? 14 : -4 });
      });
      view.legend(names.map((name, i) => ["square", colours[i],
        ["tokens unchanged", "exact step, Z − ∇Rᶜ/β", "attention"][i]]));
      view.say(`Attention keeps ${L.fixed(seen.gains.attention[0])} of a token's part in its own head and ` +
        `${L.fixed(seen.gains.attention[1])} of its parts in the others, and leaves ${L.say(100 * left[2])} % of the ` +
        `noise; the exact step keeps ${L.fixed(seen.gains.exact[0])} and ${L.fixed(seen.gains.exact[1])}, and leaves ` +
        `${L.say(100 * left[1])} %. n/(Kp) = ${L.say(seen.load)}.`);
    },
  });
})();

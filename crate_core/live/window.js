/* The window: see window.py, whose `numbers` this repeats. */
(function () {
  "use strict";
  const L = window.crateLive;

  /* denoising_cosine_law of crate_core.theory.law */
  function law(n, d, K, p, sigma, eps) {
    const beta = p / (n * eps * eps), gamma = n / (K * p), t2 = sigma * sigma * p, t1 = 1 + t2;
    const rho2 = (K - 1) * t2;
    let low = 1 / (1 / beta + gamma * (t1 + rho2)), high = beta, x = 0;
    for (let i = 0; i < 100; i++) {
      x = Math.sqrt(low * high);
      const total = x / beta + gamma * (t1 * x / (1 + t1 * x) + rho2 * x / (1 + t2 * x));
      if (total < 1) low = x; else high = x;
    }
    const m = x / beta, q1 = 1 / (1 + t1 * x), q2 = 1 / (1 + t2 * x);
    const energy = t1 * q1 * q1 + rho2 * q2 * q2;
    return Math.sqrt((K - 1) * p / (d - p)) *
      Math.sqrt(m * (1 + beta * gamma * energy) * rho2 / energy) * q2;
  }
  const evenRatio = ([low, high], count) =>
    Array.from({ length: count }, (_, i) => low * Math.pow(high / low, (i + 0.5) / count));

  function numbers(state, data) {
    const o = data.inputs, [d, K, p] = o.sizes[state.size];
    const at = (n, noise, eps) => law(n, d, K, p, noise / Math.sqrt(d), eps);
    const tokens = load => Math.max(1, Math.floor(load * K * p + 0.5));
    const loads = evenRatio(o.loads, o.columns), { tokens: n, noise, eps } = state;
    return {
      load: n / (K * p), law: at(n, noise, eps),
      curve: evenRatio(o.loads, o.curve).map(x => at(tokens(x), noise, eps)),
      noise_map: evenRatio(o.noises, o.rows).map(y => loads.map(x => at(tokens(x), y, eps))),
      eps_map: evenRatio(o.precisions, o.rows).map(y => loads.map(x => at(tokens(x), noise, y))),
      window: [noise, p * noise / n],
    };
  }

  let panels = null;
  L.define("window", {
    numbers,
    begin(view, data) {
      /* a click or a drag in a map puts the point there */
      const inside = (v, [low, high]) => Math.min(high, Math.max(low, v));
      view.draggable("Click or drag in a map, or move the point by the arrow keys.", {
        at: (px, py) => { const i = panels.findIndex(p => p.contains(px, py)); return i > 0 ? i : null; },
        move(i, px, py) {
          const [load, y] = panels[i].toData(px, py), [, K, p] = data.inputs.sizes[view.state.size];
          const n = Math.min(6144, Math.max(1, Math.round(load * K * p)));
          view.set(i === 1 ? { tokens: n, noise: inside(y, data.inputs.noises) } :
            { tokens: n, eps: inside(y, data.inputs.precisions) });
        },
        nudge(dx, dy) {
          const { tokens, noise } = view.state, moved = Math.round(tokens * Math.pow(1.1, dx));
          const n = moved === tokens ? tokens + Math.sign(dx) : moved;
          view.set({ tokens: Math.min(6144, Math.max(1, n)),
            noise: inside(noise * Math.pow(1.1, -dy), data.inputs.noises) });
        },
      });
    },
    draw(view, state, seen, data) {
      const o = data.inputs, map = (title, y) => ({ title, x: o.loads, y, logx: true, logy: true, noGrid: true, xlabel: "load n/(Kp)" });
      panels = view.panels([{ title: "cosine, by the law", x: o.loads, y: [0, 1], logx: true, xlabel: "load n/(Kp)" },
        map("noise ν", o.noises), map("precision ε", o.precisions)], 270, 240);
      const [curve, ...maps] = panels, loads = evenRatio(o.loads, o.curve);
      curve.line(loads.map(x => [x, Math.sqrt(Math.max(0, 1 - x))]), "ink", { "stroke-width": 1.2, "stroke-dasharray": "5 3" });
      curve.line(loads.map((x, i) => [x, seen.curve[i]]), "blue", { "stroke-width": 2.5 });
      curve.dot([seen.load, seen.law], "orange", 0, { r: 6, stroke: "var(--live-ink)" });
      [[seen.noise_map, o.noises, state.noise], [seen.eps_map, o.precisions, state.eps]].forEach(([grid, ends, y], i) => {
        maps[i].image(grid.slice().reverse(), o.loads, ends, "blue");
        maps[i].contour(evenRatio(o.loads, o.columns), evenRatio(ends, o.rows), grid, [0.5, 0.9], "ink");
        maps[i].dot([seen.load, y], "orange", 0, { r: 6, stroke: "var(--live-ink)", style: "touch-action: none; cursor: grab" });
      });
      view.legend([["line", "blue", "cosine by the law (maps: darker is nearer to 1)"], ["dash", "ink", "√(1 − n/(Kp))"],
        ["line", "ink", "in the maps: cosine .5 and .9"], ["dot", "orange", "your point"]]);
      const [noise, few] = seen.window;
      const why = seen.law > 0.9 ? "inside the window" : seen.load > 0.5 ? "too many tokens: few directions are free" :
        state.eps * state.eps > few ? "too little noise for this ε: the gradient holds signal" :
          noise > state.eps ? "too much noise for this ε: it counts as signal of its own" : "near the edge of the window";
      view.say(`Cosine ${L.fixed(seen.law)} at n/(Kp) = ${L.say(seen.load)} (${why}). ` +
        `A gradient of nothing but the free noise would have ${L.fixed(Math.sqrt(Math.max(0, 1 - seen.load)))}.`);
    },
  });
})();

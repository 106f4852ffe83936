/* Structured flow beside probability flow: see flow.py, whose `numbers` this repeats. */
(function () {
  "use strict";
  const L = window.crateLive, A = L.algebra;
  const COLOURS = ["blue", "orange", "green", "pink"];

  /* Wright's omega: w + ln w = x, by Newton's method in y = ln w */
  function omega(x) {
    let y = x > 1 ? Math.log(x) : x;
    for (let k = 0; k < 60; k++) {
      const e = Math.exp(y), step = (y + e - x) / (1 + e);
      y -= step;
      if (Math.abs(step) <= 1e-16 * Math.abs(y)) break;
    }
    return Math.exp(y);
  }
  /* s' = -beta s / (1 + beta s^2), solved */
  function flowed(s, beta, time) {
    if (s === 0) return 0;
    const energy = beta * s * s, x = Math.log(beta) + 2 * Math.log(s) + energy - 2 * beta * time;
    const w = omega(x);
    return x < 0 ? s * Math.exp((energy - 2 * beta * time - w) / 2) : Math.sqrt(w / beta);
  }
  /* (z - E[x | z]) / sigma for bases that are columns of the identity */
  function field(z, sigma, K, p) {
    const s2 = sigma * sigma, t2 = 1 / p, all = A.dot(z, z);
    const energy = [];
    for (let k = 0; k < K; k++) {
      let e = 0;
      for (let j = k * p; j < (k + 1) * p; j++) e += z[j] * z[j];
      energy.push(e);
    }
    const gamma = A.softmax(energy.map(e => -0.5 * (e / (t2 + s2) + (all - e) / s2)));
    return z.map((x, j) => (x - gamma[Math.floor(j / p)] * t2 / (t2 + s2) * x) / sigma);
  }

  let kept = null;  // paths do not depend on the time: computed once for the other controls
  function paths(state, data) {
    const key = [state.tokens, state.noise, state.eps].join();
    if (kept && kept.key === key) return kept;
    const { heads: K, rank: p, codes, noise, steps, longest, lowest } = data.inputs;
    const n = state.tokens, d = K * p, sigma = state.noise / Math.sqrt(d);
    const beta = p / (n * state.eps * state.eps), clean = [], z = [];
    for (let i = 0; i < n; i++) {
      const x = new Array(d).fill(0);
      for (let j = 0; j < p; j++) x[(i % K) * p + j] = codes[i][j];
      clean.push(x);
      z.push(A.add(x, noise[i], sigma));
    }
    const levels = [];
    for (let k = 0; k <= steps; k++) levels.push(sigma * Math.pow(lowest, k / steps));
    const probability = [z];
    for (let k = 0; k < steps; k++) {
      const h = levels[k + 1] - levels[k];
      probability.push(probability[k].map(row => {
        const first = field(row, levels[k], K, p);
        const second = field(A.add(row, first, h), levels[k + 1], K, p);
        return row.map((x, j) => x + h / 2 * (first[j] + second[j]));
      }));
    }
    const parts = [];
    for (let k = 0; k < K; k++) {
      const V = z.map(row => row.slice(k * p, (k + 1) * p));
      const tall = n >= p, { u, s, v } = A.svd(tall ? V : A.transpose(V));
      const order = s.map((_, i) => i).sort((i, j) => s[j] - s[i]);
      parts.push(order.map(i => ({ s: s[i], tokens: (tall ? u : v)[i], directions: (tall ? v : u)[i] })));
    }
    const structured = [];
    for (let m = 0; m <= steps; m++) {
      const out = A.zeros(n, d);
      parts.forEach((list, k) => list.forEach(part => {
        const s = flowed(part.s, beta, longest * m / steps / beta);
        for (let i = 0; i < n; i++) {
          for (let j = 0; j < p; j++) out[i][k * p + j] += s * part.tokens[i] * part.directions[j];
        }
      }));
      structured.push(out);
    }
    const distance = (a, b) => a.reduce((sum, row, i) =>
      sum + row.reduce((s, x, j) => s + (x - b[i][j]) ** 2, 0), 0);
    const before = distance(z, clean), left = list => list.map(after => distance(after, clean) / before);
    kept = { key, K, p, n, beta, z, levels, structured, probability, parts,
      left_structured: left(structured), left_probability: left(probability) };
    return kept;
  }

  function numbers(state, data) {
    const { steps, longest } = data.inputs, o = paths(state, data), now = Math.round(steps * state.time);
    const seen = tokens => tokens.map((row, i) => {
      const inside = A.norm(row.slice((i % o.K) * o.p, (i % o.K + 1) * o.p));
      return [inside, Math.sqrt(Math.max(0, A.dot(row, row) - inside * inside))];
    });
    return {
      beta_time: longest * now / steps, sigma: o.levels[now],
      start: seen(o.z), structured: seen(o.structured[now]), probability: seen(o.probability[now]),
      singular: o.parts.map(list => list.map(part => part.s)),
      singular_now: o.parts.map(list => list.map(part => flowed(part.s, o.beta, longest * now / steps / o.beta))),
      own_share: o.parts.map((list, k) => list.map(part =>
        part.tokens.reduce((s, x, i) => s + (i % o.K === k ? x * x : 0), 0))),
      left_structured: o.left_structured, left_probability: o.left_probability,
    };
  }

  L.define("flow", {
    numbers,
    draw(view, state, seen, data) {
      const K = data.inputs.heads, steps = data.inputs.steps, now = Math.round(steps * state.time);
      const plane = title => ({ title, x: [-1.6, 1.6], y: [-1.3, 1.3], equal: true, wide: true, bare: true });
      const pictures = view.panels([plane("structured flow"), plane("probability flow")], 270, 300);
      ["structured", "probability"].forEach((name, which) => {
        const panel = pictures[which];
        for (let k = 0; k < K; k++) {
          const a = k * Math.PI / 2;
          panel.line([[0, 0], [3 * Math.cos(a), 3 * Math.sin(a)]], "grid", { "stroke-width": 1.5 });
        }
        seen[name].forEach((end, i) => {
          const a = (i % K) * Math.PI / 2, own = [Math.round(Math.cos(a)), Math.round(Math.sin(a))];
          const side = Math.floor(i / K) % 2 === 0 ? 1 : -1, normal = [-side * own[1], side * own[0]];
          const place = ([x, y]) => [x * own[0] + y * normal[0], x * own[1] + y * normal[1]];
          panel.line([place(seen.start[i]), place(end)], "muted", { "stroke-width": 1.2 });
          panel.dot(place(seen.start[i]), "muted", i % K, { r: 3, opacity: 0.6 });
          panel.dot(place(end), COLOURS[i % K], i % K);
        });
      });
      const bars = [];
      seen.singular.forEach((list, k) => list.forEach((s, i) =>
        bars.push({ s, now: seen.singular_now[k][i], own: seen.own_share[k][i] > 0.5 })));
      bars.sort((a, b) => b.s - a.s);
      const worst = Math.min(2, Math.max(1.1, ...seen.left_structured, ...seen.left_probability));
      const [values, left] = view.panels([
        { title: "singular values, structured flow", x: [-0.7, bars.length - 0.3], y: [0, 1.08 * bars[0].s], noXTicks: true,
          xlabel: "all heads, sorted" },
        { title: "noise left", x: [0, 1], y: [0, worst], xlabel: "share of the way" }], 250, 300);
      const w = Math.max(2, values.area.w / bars.length - 3);
      bars.forEach((bar, i) => {
        const name = bar.own ? "blue" : "orange";
        values.bar(i, 0, bar.s, w, name, { opacity: 0.25 });
        values.bar(i, 0, bar.now, w, name);
        if (!bar.own) values.dot([i, bar.s], "ink", 2, { r: 2.5 });
      });
      const curve = list => list.map((v, i) => [i / steps, v]);
      left.line([[state.time, 0], [state.time, worst]], "muted", { "stroke-width": 1 });
      left.line(curve(seen.left_structured), "blue");
      left.line(curve(seen.left_probability), "green", { "stroke-dasharray": "6 3" });
      left.dot([state.time, seen.left_structured[now]], "blue", 0);
      left.dot([state.time, seen.left_probability[now]], "green", 1);
      view.legend([["square", "blue", "singular value of a head's own tokens"],
        ["square", "orange", "of other tokens' noise (with a mark); pale: at the start"],
        ["line", "blue", "noise left, structured"], ["dash", "green", "probability flow"]]);
      const best = seen.left_structured.indexOf(Math.min(...seen.left_structured));
      view.say(`Structured flow at βt = ${L.fixed(seen.beta_time)}: ${L.say(100 * seen.left_structured[now])} % of the noise left ` +
        `(least: ${L.say(100 * seen.left_structured[best])} % at βt = ${L.fixed(data.inputs.longest * best / steps)}). ` +
        `Probability flow at noise ${L.say(seen.sigma * Math.sqrt(K * data.inputs.rank))}: ` +
        `${L.say(100 * seen.left_probability[now])} % left.`);
    },
  });
})();

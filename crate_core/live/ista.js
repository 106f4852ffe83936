/* One ISTA step in the plane: see ista.py, whose `numbers` this repeats. */
(function () {
  "use strict";
  const L = window.crateLive;

  function problem(state, data) {
    const angle = state.angle * Math.PI / 180, c = Math.cos(angle), s = Math.sin(angle);
    const [z1, z2] = data.inputs.token;
    const residual = a => [z1 - a[0] - c * a[1], z2 - s * a[1]];
    const objective = a => {
      if (a[0] < 0 || a[1] < 0) return Infinity;
      const r = residual(a);
      return 0.5 * (r[0] * r[0] + r[1] * r[1]) + state.lambd * (a[0] + a[1]);
    };
    const step = (a, eta = state.eta) => {
      const r = residual(a), back = [r[0], c * r[0] + s * r[1]];
      return a.map((x, i) => Math.max(0, x + eta * back[i] - eta * state.lambd));
    };
    return { c, s, residual, objective, step };
  }

  function numbers(state, data) {
    const { c, residual, objective, step } = problem(state, data), path = [state.start];
    for (let i = 0; i < data.inputs.steps; i++) path.push(step(path[i]));
    const along = [];
    for (let k = 1; k <= 60; k++) along.push([0.05 * k, objective(step(state.start, 0.05 * k))]);
    /* D^T D = [[1, c], [c, 1]] has the eigenvalues 1 - c and 1 + c */
    return { along, path, objective: path.map(objective), safe: 2 / (1 + Math.abs(c)),
      residual: Math.hypot(...residual(path[1])) };
  }

  let panel = null;
  L.define("ista", {
    numbers,
    begin(view) {
      const put = (x, y) => view.set({ start: [x, y].map(v => Math.min(2.2, Math.max(-0.5, v))) });
      view.draggable("Drag the start, or move it by the arrow keys.", {
        at: (px, py) => panel.contains(px, py) ? 0 : null,
        move(_, px, py) { put(...panel.toData(px, py)); },
        nudge(dx, dy) { const [x, y] = view.state.start; put(x + 0.02 * dx, y - 0.02 * dy); },
      });
    },
    draw(view, state, seen, data) {
      const [before, after] = seen.objective;
      const top = 1.4 * Math.max(isFinite(before) ? before : 0, after, 0.5);
      let graph;
      [panel, graph] = view.panels([{ x: [-0.5, 2.2], y: [-0.5, 2.2], equal: true, noGrid: true,
        xlabel: "code of atom 1", ylabel: "code of atom 2" },
        { x: [0, 3], y: [0, top], xlabel: "step size η", ylabel: "objective after one step" }], 340, 300);
      graph.line([[seen.safe, 0], [seen.safe, top]], "bad", { "stroke-dasharray": "2 3" });
      graph.text([seen.safe, top], "2/‖D‖²", { dy: 14, dx: 4 });
      if (isFinite(before)) graph.line([[0, before], [3, before]], "ink", { "stroke-width": 1.2, "stroke-dasharray": "5 3" });
      if (isFinite(before)) graph.text([3, before], "at the start", { dy: -5, dx: -4, "text-anchor": "end" });
      graph.line(seen.along, "blue");
      graph.dot([state.eta, after], "blue", 0, { r: 6 });
      const { c, s } = problem(state, data), [z1, z2] = data.inputs.token;
      /* the objective is a quadratic: its contours are ellipses around its free minimum */
      const g = [z1 - state.lambd, c * z1 + s * z2 - state.lambd], det = 1 - c * c;
      const centre = [(g[0] - c * g[1]) / det, (g[1] - c * g[0]) / det];
      for (let level = 1; level <= 16; level++) {
        const r = 0.17 * level, ellipse = [];
        for (let k = 0; k <= 72; k++) {
          const u = r * Math.cos(k * Math.PI / 36), v = r * Math.sin(k * Math.PI / 36);
          /* G = C C^T with C = [[1, 0], [c, s]]: points C^-T (u, v) from the centre */
          ellipse.push([centre[0] + u - c * v / s, centre[1] + v / s]);
        }
        panel.line(ellipse, "noise", { "stroke-width": 1 });
      }
      const x0 = panel.area.x, y1 = panel.area.y + panel.area.h, shade = { fill: L.colour("grid"), opacity: 0.9 };
      L.svg("rect", Object.assign({ x: x0, y: panel.area.y, width: panel.X(0) - x0, height: panel.area.h }, shade), panel.inside);
      L.svg("rect", Object.assign({ x: panel.X(0), y: panel.Y(0), width: panel.area.w, height: y1 - panel.Y(0) }, shade), panel.inside);
      panel.line(seen.path, "orange", { "stroke-width": 1.5, "stroke-dasharray": "4 3" });
      seen.path.slice(2).forEach(point => panel.dot(point, "orange", 0, { r: 3 }));
      panel.arrow(seen.path[0], seen.path[1], "blue", { "stroke-width": 3 });
      panel.dot(seen.path[0], "ink", 0, { r: 7, style: "touch-action: none; cursor: grab" });
      view.legend([["dot", "ink", "start (drag it)"], ["line", "blue", "one step"],
        ["dash", "orange", `${data.inputs.steps - 1} more steps`], ["square", "grid", "negative codes: objective infinite"]]);
      const infinite = "infinite (a code is negative)";
      const zeros = seen.path[1].filter(x => x === 0).length;
      view.say(`Objective ${isFinite(before) ? L.fixed(before, 3) : infinite} before the step, ${L.fixed(after, 3)} after: ` +
        `it went ${after < before ? "down" : after > before ? "up" : "nowhere"}. ` +
        `From codes ≥ 0 it cannot go up while η ≤ 2/‖D‖² = ${L.fixed(seen.safe)}; here η = ${L.fixed(state.eta)}. ` +
        `${zeros} of 2 codes ${zeros === 1 ? "is" : "are"} zero after it.`);
    },
  });
})();

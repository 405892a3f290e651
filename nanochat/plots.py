"""
Pictures for the report: numbers in, a PNG out.
Each function draws one kind of picture into one file; what it shows is measured elsewhere. Drawn without a screen (Agg).
"""
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def canvas(rows=1, columns=1, width=7.0, height=4.5):
    """(figure, axes as a list of lists)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def lines(path, panels, x, log=False):
    """
    panels, side by side: [(title, y label, {name: [(x, y, spread), ...]}), ...]; a spread of 0 or None is not drawn. A name has one colour everywhere, and
    the first panel a legend, as has each that shows a name which no panel before it did.
    """
    looks = {name: dict(color=f"C{i % 10}", linestyle=("-", "--", ":")[i // 10 % 3]) for i, name in enumerate(dict.fromkeys(name for _, _, curves in panels for name in curves))}
    known = set()
    figure, [row] = canvas(columns=len(panels), width=1.0 + 5.5 * len(panels))
    for axes, (title, y, curves) in zip(row, panels):
        for name, points in curves.items():
            across, up, spread = zip(*sorted(points))
            axes.errorbar(across, up, yerr=[s or 0 for s in spread] if any(spread) else None, label=name, capsize=2, linewidth=1.2, marker="o" if len(points) < 20 else None,
                          markersize=3, **looks[name])
        if log:
            axes.set_xscale("log", base=2)
            ticks = sorted({point[0] for points in curves.values() for point in points})
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
        axes.set(xlabel=x, ylabel=y, title=title)
        if not known.issuperset(curves):
            axes.legend(fontsize=7)
        known.update(curves)
    save(figure, path)


def heat_maps(path, panels, x, y):
    """
    panels: {row name: {column name: {x value: {y value: share in 0..1}}}}, a map in each cell, all on one scale from 0 to 1.
    """
    columns = list(dict.fromkeys(name for row in panels.values() for name in row))
    figure, grid = canvas(len(panels), len(columns), 0.8 + 2.0 * len(columns), 0.6 + 1.7 * len(panels))
    for i, (row, maps) in enumerate(panels.items()):
        for axes, column in zip(grid[i], columns):
            values = maps[column]
            across, up = list(values), list(dict.fromkeys(key for part in values.values() for key in part))
            axes.imshow([[values[a][u] for a in across] for u in up], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for n, a in enumerate(across):
                for m, u in enumerate(up):
                    axes.text(n, m, f"{100 * values[a][u]:.0f}", ha="center", va="center", fontsize=7)
            axes.set_xticks(range(len(across)), [str(a) for a in across], fontsize=7)
            axes.set_yticks(range(len(up)), [str(u) for u in up], fontsize=7)
            axes.set_title(f"{row}, {column}", fontsize=8)
            axes.set_xlabel(x, fontsize=7)
            axes.set_ylabel(y, fontsize=7)
    save(figure, path)


def scatter(path, points, x, y, title=""):
    """points: [(x, y), ...]; y is linear up to 1 and logarithmic beyond, so that a few large ones do not hide the many small."""
    figure, [[axes]] = canvas(width=5.5)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.axvline(0, color="grey", linewidth=0.6)
    axes.scatter(*zip(*points), s=4, alpha=0.4, linewidths=0)
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel=x, ylabel=y, title=title)
    save(figure, path)

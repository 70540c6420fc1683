//! Line plots over training steps.

use serde::{Deserialize, Serialize};

use crate::number::{plain, ticks};
use crate::svg::{self, FONT, WIDTH, at, is_drawable, line, text, text_width};
use crate::thin::{every, extremes, running_mean};

/// Series longer than this are drawn as a faint raw line under a bold running mean.
const SMOOTH_ABOVE: usize = 80;
/// A series is noisy when its line goes up and down this many times its range in all. A schedule
/// with warmup and decay goes twice its range.
const NOISY_PATH: f64 = 6.0;
/// The running mean covers this fraction of a series.
const WINDOW_FRACTION: usize = 40;
/// Points of the raw line: two for each bucket, and more buckets than this share a pixel.
const RAW_BUCKETS: usize = 220;
/// Points of the running mean, which has no spikes to keep.
const MEAN_POINTS: usize = 160;
/// Series up to this long also show a dot for each point.
const DOTS_UP_TO: usize = 25;
/// Height of the plotting area, in picture units.
const AREA: f64 = 190.0;

/// One line plot with its axes, units and legend.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Plot {
    /// Shown above the picture.
    pub title: String,
    /// What the x axis counts, for example `step`.
    pub x_label: String,
    /// What the y axis measures, with its unit, for example `loss (nats)`.
    pub y_label: String,
    /// The lines, in the order of the legend. Colours repeat after eight.
    pub series: Vec<Series>,
    /// Horizontal lines to compare with, such as the accuracy that label noise allows.
    #[serde(default)]
    pub reference_lines: Vec<ReferenceLine>,
}

/// One line of a [`Plot`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// `(x, y)` in axis units; sorted by x when drawn. Points that are not finite break the line
    /// and are counted below the picture. (JSON has no NaN: such points cannot be read back.)
    pub points: Vec<(f64, f64)>,
    /// An interval around the line, if there is one.
    #[serde(default)]
    pub band: Option<Band>,
}

/// An interval around a [`Series`], drawn as a tinted area.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Band {
    /// What it is, for the legend, for example `95% interval`.
    pub label: String,
    /// `(x, low, high)` in axis units; entries that are not finite are left out.
    pub points: Vec<(f64, f64, f64)>,
}

/// A dashed horizontal line in a [`Plot`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ReferenceLine {
    /// Its name in the legend.
    pub label: String,
    /// Its height in units of the y axis; not drawn unless finite.
    pub y: f64,
}

/// The ranges of the axes.
#[derive(Debug, Clone, Copy)]
struct Ranges {
    x: (f64, f64),
    y: (f64, f64),
}

/// Where the plotting area lies and what it spans.
#[derive(Debug, Clone, Copy)]
struct Frame {
    left: f64,
    top: f64,
    width: f64,
    ranges: Ranges,
}

impl Frame {
    fn x(&self, value: f64) -> f64 {
        let (low, high) = self.ranges.x;
        self.left + (value - low) / (high - low) * self.width
    }

    fn y(&self, value: f64) -> f64 {
        let (low, high) = self.ranges.y;
        self.top + (high - value) / (high - low) * AREA
    }

    fn point(&self, p: (f64, f64)) -> String {
        format!("{},{}", at(self.x(p.0)), at(self.y(p.1)))
    }
}

impl Plot {
    /// The picture as an SVG element for a page that carries this crate's style ([`crate::page`]).
    ///
    /// Long series are thinned and smoothed; [`Plot::caption`] says how. A plot without a finite
    /// point keeps its axes and says so.
    pub fn to_svg(&self) -> String {
        self.draw(false)
    }

    /// The picture as an SVG file of its own, with its style inside.
    ///
    /// # Examples
    ///
    /// ```
    /// let plot = report::Plot { y_label: "loss (nats)".into(), ..Default::default() };
    /// assert!(plot.to_standalone_svg().starts_with("<svg xmlns="));
    /// ```
    pub fn to_standalone_svg(&self) -> String {
        self.draw(true)
    }

    /// What a reader must know about the drawing: smoothing, and points that are missing.
    /// Empty when the picture shows every point as it is.
    pub fn caption(&self) -> String {
        let mut sentences = Vec::new();
        let mut windows: Vec<usize> = self
            .series
            .iter()
            .filter_map(Series::smoothing_window)
            .collect();
        windows.sort_unstable();
        windows.dedup();
        if let (Some(first), Some(last)) = (windows.first(), windows.last()) {
            let window = if first == last {
                first.to_string()
            } else {
                format!("{first} to {last}")
            };
            sentences.push(format!(
                "Faint: every point. Bold: running mean of {window} points."
            ));
        }
        let missing: usize = self
            .series
            .iter()
            .map(|s| s.points.len() - s.drawable().count())
            .sum();
        if missing > 0 {
            let (noun, verb) = if missing == 1 {
                ("point", "is")
            } else {
                ("points", "are")
            };
            sentences.push(format!("{missing} {noun} {verb} not finite and not drawn."));
        }
        sentences.join(" ")
    }

    /// Whether there is any point at all, finite or not.
    pub(crate) fn has_points(&self) -> bool {
        self.series.iter().any(|s| !s.points.is_empty())
    }

    fn draw(&self, standalone: bool) -> String {
        let ranges = self.ranges();
        let (x_ticks, y_ticks) = match ranges {
            Some(r) => (ticks(r.x.0, r.x.1, 5), ticks(r.y.0, r.y.1, 7)),
            None => (Vec::new(), Vec::new()),
        };
        let mut body = String::new();

        let mut top = 4.0;
        // Bold text of 14 units is about as wide as plain text of 15.5.
        for title in svg::wrap(&self.title, 15.5, WIDTH - 16.0, 2) {
            top += 17.0;
            body += &text(8.0, top, "class=\"h\"", &title);
        }
        let (legend, legend_bottom) = self.legend(top + 8.0);
        top = legend_bottom + 8.0;

        let y_label = svg::wrap(&self.y_label, FONT, AREA + 20.0, 2);
        let tick_width = y_ticks
            .iter()
            .map(|t| text_width(&t.1, 12.0))
            .fold(16.0, f64::max);
        let left = 8.0 + 15.0 * y_label.len() as f64 + tick_width + 8.0;
        let bottom = top + AREA;
        let right = WIDTH - 16.0;
        let frame = Frame {
            left,
            top,
            width: right - left,
            ranges: ranges.unwrap_or(Ranges {
                x: (0.0, 1.0),
                y: (0.0, 1.0),
            }),
        };

        for (i, row) in y_label.iter().enumerate() {
            let x = 16.0 + 15.0 * i as f64;
            let y = top + AREA / 2.0;
            let turn = format!(
                "class=\"soft\" text-anchor=\"middle\" transform=\"rotate(-90 {} {})\"",
                at(x),
                at(y)
            );
            body += &text(x, y, &turn, row);
        }
        for (value, label) in &y_ticks {
            let y = frame.y(*value);
            body += &line(left, y, right, y, "grid");
            let end = "class=\"tick\" text-anchor=\"end\"";
            body += &text(left - 6.0, y + 4.0, end, label);
        }
        let mut free_from = f64::NEG_INFINITY;
        for (value, label) in &x_ticks {
            let x = frame.x(*value);
            body += &line(x, bottom, x, bottom + 4.0, "axis");
            // Labels are centred on their ticks, and kept inside the picture at its right edge.
            let half = text_width(label, 12.0) / 2.0;
            let centre = x.min(WIDTH - 2.0 - half);
            if centre - half > free_from {
                let middle = "class=\"tick\" text-anchor=\"middle\"";
                body += &text(centre, bottom + 17.0, middle, label);
                free_from = centre + half + 4.0;
            }
        }
        body += &line(left, bottom, right, bottom, "axis");
        body += &line(left, top, left, bottom, "axis");
        let x_label = svg::fit(&self.x_label, FONT, right - left);
        let middle = "class=\"soft\" text-anchor=\"middle\"";
        let centre = (left + right) / 2.0;
        body += &text(centre, bottom + 34.0, middle, &x_label);

        let mut extra = String::new();
        if let Some(Ranges { x, y }) = ranges {
            for (i, reference) in self.drawable_references().enumerate() {
                let y = frame.y(reference.y);
                body += &line(left, y, right, y, &format!("refline r{}", i % 3));
            }
            // Every faint line lies below every bold one.
            for (i, series) in self.series.iter().enumerate() {
                body += &series.draw_behind(i, &frame);
            }
            for (i, series) in self.series.iter().enumerate() {
                body += &series.draw(i, &frame);
            }
            // What the script needs to turn a place in the picture back into values.
            extra = format!(
                " data-area=\"{} {} {} {}\" data-range=\"{} {} {} {}\" data-x=\"{}\"",
                at(left),
                at(top),
                at(right - left),
                at(AREA),
                x.0,
                x.1,
                y.0,
                y.1,
                crate::escape(&self.x_label)
            );
        } else {
            let middle = "class=\"soft\" text-anchor=\"middle\"";
            body += &text(centre, top + AREA / 2.0, middle, "no finite values");
        }
        body += &legend;
        let label = format!("{}: {} over {}", self.title, self.y_label, self.x_label);
        svg::wrap_svg(&label, bottom + 44.0, &extra, standalone, &body)
    }

    /// The legend's rows, and where they end.
    fn legend(&self, top: f64) -> (String, f64) {
        let mut entries: Vec<(String, String)> = Vec::new();
        for (i, series) in self.series.iter().enumerate() {
            entries.push((colour_class(i), series.name.clone()));
        }
        let mut bands: Vec<(usize, &str)> = Vec::new();
        for (i, series) in self.series.iter().enumerate() {
            if let Some(band) = &series.band
                && !band.points.is_empty()
                && !bands.iter().any(|b| b.1 == band.label)
            {
                bands.push((i, &band.label));
            }
        }
        for (i, label) in bands {
            entries.push((format!("band {}", colour_class(i)), label.to_owned()));
        }
        for (i, reference) in self.drawable_references().enumerate() {
            let name = format!("{} ({})", reference.label, plain(reference.y));
            entries.push((format!("refline r{}", i % 3), name));
        }

        let mut out = String::from("<g class=\"legend\">");
        let (mut x, mut y) = (8.0, top + 10.0);
        for (class, name) in &entries {
            let name = svg::fit(name, FONT, WIDTH - 60.0);
            let width = 26.0 + text_width(&name, FONT) + 14.0;
            if x > 8.0 && x + width - 14.0 > WIDTH - 6.0 {
                x = 8.0;
                y += 17.0;
            }
            out += &match class.split_once(' ') {
                Some(("band", colour)) => format!(
                    "<g class=\"{colour}\"><polygon points=\"{0},{1} {2},{1} {2},{3} {0},{3}\"/></g>",
                    at(x),
                    at(y - 9.0),
                    at(x + 20.0),
                    at(y + 1.0)
                ),
                Some(("refline", _)) => line(x, y - 4.0, x + 20.0, y - 4.0, class),
                _ => format!(
                    "<g class=\"{class}\">{}</g>",
                    line(x, y - 4.0, x + 20.0, y - 4.0, "key")
                ),
            };
            out += &text(x + 26.0, y, "", &name);
            x += width;
        }
        out += "</g>";
        (out, if entries.is_empty() { top } else { y + 4.0 })
    }

    fn drawable_references(&self) -> impl Iterator<Item = &ReferenceLine> {
        self.reference_lines.iter().filter(|r| is_drawable(r.y))
    }

    /// What the axes span: every drawable point, band and reference line. `None` without points.
    fn ranges(&self) -> Option<Ranges> {
        let xs = self.series.iter().flat_map(|s| s.drawable().map(|p| p.0));
        let x = span(xs)?;
        let ys = self.series.iter().flat_map(|s| s.drawable().map(|p| p.1));
        let bands = self
            .series
            .iter()
            .flat_map(|s| s.drawable_band().into_iter().flat_map(|p| [p.1, p.2]));
        let references = self.drawable_references().map(|r| r.y);
        let (low, high) = span(ys.chain(bands).chain(references))?;
        let air = 0.04 * (high - low);
        // Air below a curve that touches zero would suggest that it could be negative.
        let touches_zero = low >= 0.0 && low - air < 0.0;
        Some(Ranges {
            x,
            y: (if touches_zero { 0.0 } else { low - air }, high + air),
        })
    }
}

impl Series {
    fn drawable(&self) -> impl Iterator<Item = (f64, f64)> {
        let keep = |p: &(f64, f64)| is_drawable(p.0) && is_drawable(p.1);
        self.points.iter().copied().filter(keep)
    }

    fn drawable_band(&self) -> Vec<(f64, f64, f64)> {
        let points = self.band.as_ref().map_or(&[][..], |b| &b.points);
        let keep = |p: &(f64, f64, f64)| is_drawable(p.0) && is_drawable(p.1) && is_drawable(p.2);
        points.iter().copied().filter(keep).collect()
    }

    /// Runs of drawable points between points that are not.
    fn pieces(&self) -> Vec<Vec<(f64, f64)>> {
        let mut points = self.points.clone();
        points.retain(|p| is_drawable(p.0));
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
            .split(|p| !is_drawable(p.1))
            .filter(|piece| !piece.is_empty())
            .map(<[_]>::to_vec)
            .collect()
    }

    /// How many points the running mean covers, an odd number. `None` for a series that is
    /// drawn as it is: a short one, or one without noise, whose corners a mean would round off.
    fn smoothing_window(&self) -> Option<usize> {
        let ys: Vec<f64> = self.drawable().map(|p| p.1).collect();
        if ys.len() <= SMOOTH_ABOVE {
            return None;
        }
        let (low, high) = span(ys.iter().copied())?;
        let path: f64 = ys.windows(2).map(|w| (w[1] - w[0]).abs()).sum();
        (path > NOISY_PATH * (high - low)).then(|| (ys.len() / WINDOW_FRACTION).max(5) | 1)
    }

    /// A run of NaN here and there must not multiply the points that are kept.
    fn share(&self, n: usize, piece: &[(f64, f64)]) -> usize {
        let total = self.drawable().count().max(1);
        (n * piece.len()).div_ceil(total).max(1)
    }

    /// The interval, and the raw line where a running mean goes over it.
    fn draw_behind(&self, index: usize, frame: &Frame) -> String {
        let mut out = format!("<g class=\"{}\">", colour_class(index));
        let mut band = self.drawable_band();
        band.sort_by(|a, b| a.0.total_cmp(&b.0));
        let band = every(&band, MEAN_POINTS);
        if band.len() > 1 {
            let upper = band.iter().map(|p| frame.point((p.0, p.2)));
            let lower = band.iter().rev().map(|p| frame.point((p.0, p.1)));
            let outline: Vec<String> = upper.chain(lower).collect();
            out += &format!("<polygon points=\"{}\"/>", outline.join(" "));
        }
        if self.smoothing_window().is_some() {
            for piece in &self.pieces() {
                let raw = extremes(piece, self.share(RAW_BUCKETS, piece));
                out += &polyline(&raw, frame, " class=\"raw\"");
            }
        }
        out += "</g>";
        out
    }

    /// The line that the legend names.
    fn draw(&self, index: usize, frame: &Frame) -> String {
        let mut out = format!(
            "<g class=\"series {}\" data-name=\"{}\">",
            colour_class(index),
            crate::escape(&self.name)
        );
        let window = self.smoothing_window();
        let total = self.drawable().count();
        for piece in &self.pieces() {
            let bold = match window {
                Some(window) => every(&running_mean(piece, window), self.share(MEAN_POINTS, piece)),
                None => extremes(piece, self.share(RAW_BUCKETS, piece)),
            };
            out += &polyline(&bold, frame, "");
            if piece.len() == 1 || total <= DOTS_UP_TO {
                for p in every(piece, DOTS_UP_TO) {
                    out += &format!(
                        "<circle cx=\"{}\" cy=\"{}\" r=\"2.5\"/>",
                        at(frame.x(p.0)),
                        at(frame.y(p.1))
                    );
                }
            }
        }
        out += "</g>";
        out
    }
}

fn polyline(points: &[(f64, f64)], frame: &Frame, class: &str) -> String {
    let places: Vec<String> = points.iter().map(|p| frame.point(*p)).collect();
    format!("<polyline{class} points=\"{}\"/>", places.join(" "))
}

fn colour_class(index: usize) -> String {
    let dashed = if index >= 4 { " d3" } else { "" };
    format!("c{}{dashed}", index % 8)
}

/// The least and the greatest value, pushed apart where they are the same.
fn span(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    if low > high {
        return None;
    }
    // Below this the ticks would have more digits than f64 can tell apart.
    let least = 1e-9 * low.abs().max(high.abs());
    if high - low > least {
        return Some((low, high));
    }
    let around = if low == 0.0 { 1.0 } else { 0.5 * low.abs() };
    Some((low - around, high + around))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plot(points: Vec<(f64, f64)>) -> Plot {
        Plot {
            title: "Loss".into(),
            x_label: "step".into(),
            y_label: "loss (nats)".into(),
            series: vec![Series {
                name: "train".into(),
                points,
                band: None,
            }],
            reference_lines: Vec::new(),
        }
    }

    #[test]
    fn axes_units_and_legend_are_written() {
        let mut plot = plot(vec![(0.0, 0.7), (50.0, 0.3)]);
        plot.reference_lines.push(ReferenceLine {
            label: "ceiling".into(),
            y: 0.5,
        });
        let svg = plot.to_svg();
        for wanted in [
            ">Loss<",
            ">step<",
            ">loss (nats)<",
            ">train<",
            ">ceiling (0.500)<",
            ">0.4<",
            ">20<",
        ] {
            assert!(svg.contains(wanted), "{wanted} is missing in {svg}");
        }
    }

    #[test]
    fn nan_breaks_the_line_and_is_counted() {
        let plot = plot(vec![
            (0.0, 1.0),
            (1.0, 2.0),
            (2.0, f64::NAN),
            (3.0, 2.0),
            (4.0, 1.0),
        ]);
        assert_eq!(plot.to_svg().matches("<polyline").count(), 2);
        assert_eq!(plot.caption(), "1 point is not finite and not drawn.");
        assert!(!plot.to_svg().contains("NaN"));
    }

    #[test]
    fn nothing_finite_keeps_the_axes_and_says_so() {
        for points in [
            Vec::new(),
            vec![(0.0, f64::NAN)],
            vec![(f64::INFINITY, 1.0)],
        ] {
            let svg = plot(points).to_svg();
            assert!(svg.contains("no finite values") && svg.contains("loss (nats)"));
        }
    }

    #[test]
    fn one_point_is_a_dot() {
        let svg = plot(vec![(7.0, 0.0)]).to_svg();
        assert_eq!(svg.matches("<circle").count(), 1);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn two_thousand_steps_stay_small() {
        let points = (0..2000)
            .map(|i| (f64::from(i), f64::from(i).sin()))
            .collect();
        let plot = plot(points);
        // Ten plots of four such series are then well below the 2 MB that a page may take.
        assert!(plot.to_svg().len() < 16_000, "{}", plot.to_svg().len());
        assert!(plot.caption().contains("running mean of 51 points"));
    }

    #[test]
    fn a_schedule_keeps_its_corner() {
        let rate = |i: u32| f64::from(i.min(100)).min(f64::from(2000 - i) / 19.0);
        let plot = plot((0..2000).map(|i| (f64::from(i), rate(i))).collect());
        assert_eq!(plot.caption(), "");
        assert!(!plot.to_svg().contains("class=\"raw\""));
    }

    #[test]
    fn names_from_data_are_escaped() {
        let mut plot = plot(vec![(0.0, 1.0)]);
        plot.title = "</svg><script>alert(1)</script>".into();
        plot.series[0].name = "\"><img src=x onerror=alert(1)>".into();
        let svg = plot.to_standalone_svg();
        assert!(!svg.contains("<script") && !svg.contains("<img"));
    }

    proptest! {
        #[test]
        fn any_numbers_are_drawn_without_panic(
            points in prop::collection::vec((prop::num::f64::ANY, prop::num::f64::ANY), 0..40),
            reference in prop::num::f64::ANY,
        ) {
            let mut plot = plot(points.clone());
            plot.series[0].band = Some(Band {
                label: "interval".into(),
                points: points.iter().map(|p| (p.0, p.1 - 1.0, p.1 * 2.0)).collect(),
            });
            plot.reference_lines.push(ReferenceLine { label: "r".into(), y: reference });
            let svg = plot.to_svg();
            prop_assert!(!svg.contains("NaN") && !svg.contains("inf"), "{}", svg);
        }
    }
}
